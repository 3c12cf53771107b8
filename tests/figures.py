# SPDX-License-Identifier: LGPL-2.1-or-later
"""Collects figures of the long tests, for the table at the end of a test run (`./dev soak`; docs/reliability.md)."""

from collections.abc import Sequence
from statistics import median

#: The figures so far. Figures of other processes of the run are added at the end.
FIGURES: list[tuple[str, str]] = []


def figure(what: str, value: object) -> None:
    FIGURES.append((what, str(value)))


def milliseconds(seconds: Sequence[float]) -> str:
    """Return the median of times as text."""
    return f"{median(seconds) * 1000:.1f} ms"


def table() -> list[str]:
    """Return the lines of the table, or an empty list if there are no figures."""
    if not FIGURES:
        return []
    width = max(len(what) for what, _ in FIGURES)
    return [f"| {what:<{width}} | {value} |" for what, value in FIGURES]

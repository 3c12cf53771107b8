# SPDX-License-Identifier: LGPL-2.1-or-later
"""Figures that the long tests find, for the table that a test run ends with (`./dev soak`; docs/reliability.md)."""

from collections.abc import Sequence
from statistics import median

#: What was found so far; what other processes of the same run found is added in the end.
FIGURES: list[tuple[str, str]] = []


def figure(what: str, value: object) -> None:
    """Note a figure."""
    FIGURES.append((what, str(value)))


def milliseconds(seconds: Sequence[float]) -> str:
    """The median of times, for people."""
    return f"{median(seconds) * 1000:.1f} ms"


def table() -> list[str]:
    """The lines of the table; none if there are no figures."""
    if not FIGURES:
        return []
    width = max(len(what) for what, _ in FIGURES)
    return [f"| {what:<{width}} | {value} |" for what, value in FIGURES]

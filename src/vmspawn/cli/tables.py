# SPDX-License-Identifier: LGPL-2.1-or-later
"""Prints tables for people and JSON for programs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from ..text import printable

JSON_MODES = ("pretty", "short", "off")

#: The width if neither the environment nor the terminal reports one.
_WIDTH_DEFAULT = 80

_STDOUT = 1

_UNITS = ("B", "K", "M", "G", "T", "P")


def print_json(value: Any, mode: str) -> None:
    """Print a value as JSON, `pretty` over several lines or `short` on one."""
    print(json.dumps(value, indent=2) if mode == "pretty" else json.dumps(value, separators=(",", ":")), flush=True)


def terminal_width(descriptor: int = _STDOUT) -> int:
    """Return the width of the terminal in characters.

    argparse's own code for this would import more modules than the rest of vmctl.
    """
    text = os.environ.get("COLUMNS", "")
    if text.isascii() and text.isdecimal() and len(text) < 6 and int(text):
        return int(text)
    try:
        return os.get_terminal_size(descriptor).columns or _WIDTH_DEFAULT
    except OSError:
        return _WIDTH_DEFAULT


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = (), fit: bool = False
) -> None:
    """Print rows below the names of their columns; the columns in `right` are aligned to the right.

    On a terminal that is too narrow, `fit` leaves out the last columns. Without it, each row is printed as fields.
    """
    is_terminal = sys.stdout.isatty()
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]
    shown = fitting(widths, terminal_width()) if is_terminal else widths
    if len(shown) < len(widths) and not fit:
        print_records(columns, rows)
        return
    widths = shown
    for row in (columns, *rows):
        cells = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(columns, row, widths, strict=False)
        ]
        line = " ".join(cells).rstrip()
        print(f"\033[4m{line}\033[0m" if row is columns and is_terminal else line)


def print_records(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print each row as names and values, with an empty line between two rows."""
    for number, row in enumerate(rows):
        if number:
            print()
        print_fields(list(zip(columns, row, strict=True)))


def fitting(widths: Sequence[int], limit: int) -> list[int]:
    """Return the widths of the columns that fit in a line; at least the first column."""
    found = list(widths)
    while len(found) > 1 and sum(found) + len(found) - 1 > limit:
        found.pop()
    return found


def print_fields(fields: Sequence[tuple[str, str]]) -> None:
    """Print names and values as `systemctl status` does. A value may have several lines."""
    width = max(len(name) for name, _ in fields)
    for name, value in fields:
        first, *rest = map(printable, value.split("\n"))
        print(f"{name:>{width}}: {first}", *(f"{'':{width}}  {line}" for line in rest), sep="\n")


def format_size(size: int) -> str:
    """Return a size with a unit, in powers of 1024."""
    value = float(size)
    for unit in _UNITS:
        if value < 1024 or unit == _UNITS[-1]:
            return f"{value:.0f}{unit}" if value == int(value) else f"{value:.1f}{unit}"
        value /= 1024
    raise AssertionError("unreachable")


def format_duration(seconds: float) -> str:
    """Return a time span in its two largest units, as systemd prints it."""
    left = int(seconds)
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if left >= length or (unit == "s" and not parts):
            parts.append(f"{left // length}{unit}")
            left %= length
    return " ".join(parts[:2])

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Shows the progress of a copy on a terminal."""

from __future__ import annotations

import sys
import time
from typing import Self

from ..tables import format_size, terminal_width

_STDERR = 2

#: Seconds between two updates, and before the first one: a quick copy shows nothing.
_INTERVAL = 0.1
_DELAY = 0.5

#: Columns for the numbers beside the bar.
_NUMBERS = 40


class ProgressBar:
    """A line on standard error, which is cleared at the end."""

    def __init__(self, *, is_wanted: bool) -> None:
        #: True if the bar is wanted and standard error is a terminal.
        self.is_shown = is_wanted and sys.stderr.isatty()
        self._start = time.monotonic()
        self._next = self._start + _DELAY
        self._is_dirty = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_dirty:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def show(self, done: int, total: int) -> None:
        """Show that `done` of `total` bytes are copied."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _INTERVAL
        self._is_dirty = True
        print(f"\r\033[K{line(done, total, now - self._start, terminal_width(_STDERR))}", end="", file=sys.stderr)
        sys.stderr.flush()


def line(done: int, total: int, seconds: float, width: int) -> str:
    """Return the line: a bar, the percentage, the numbers of bytes, and the rate."""
    part = done / total if total else 1.0
    room = max(10, min(60, width - _NUMBERS))
    filled = int(part * room)
    rate = format_size(round(done / seconds)) if seconds else "-"
    return f"[{'#' * filled}{'.' * (room - filled)}] {part:4.0%} {format_size(done)} of {format_size(total)}, {rate}/s"

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Prints vmspawn's own messages on a terminal that it may share with a guest."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from ..text import printable


class Messages:
    """Prints lines on standard error, or with the function that `redirect` sets."""

    def __init__(self, program: str, *, quiet: bool) -> None:
        self._program = program
        self._quiet = quiet
        self._write: Callable[[str], None] = _to_stderr

    def notice(self, line: str) -> None:
        """Print a line, unless `quiet` is set."""
        if not self._quiet:
            self.report(line)

    def report(self, line: str) -> None:
        """Print a line even if `quiet` is set."""
        self._write(f"{self._program}: {printable(line)}")

    def redirect(self, write: Callable[[str], None] | None) -> None:
        """Print lines with `write` from now on, or on standard error for None."""
        self._write = write or _to_stderr


def _to_stderr(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        # The descriptor is closed, or the terminal has hung up.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - a standard stream is never closed

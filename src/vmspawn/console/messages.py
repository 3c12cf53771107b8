# SPDX-License-Identifier: LGPL-2.1-or-later
"""Prints a program's own messages, in lines, on a terminal that it may share with a guest."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from ..text import printable


class Messages:
    """Prints lines on standard error, or by the function that `redirect` sets."""

    def __init__(self, program: str, *, quiet: bool) -> None:
        self._program = program
        self._quiet = quiet
        self._write: Callable[[str], None] = _to_stderr

    def notice(self, line: str) -> None:
        """Print a line, unless the user wants quiet."""
        if not self._quiet:
            self.report(line)

    def report(self, line: str) -> None:
        """Print a line that the user has to see."""
        self._write(f"{self._program}: {printable(line)}")

    def redirect(self, write: Callable[[str], None] | None) -> None:
        """Print lines by `write` from now on; None is standard error again."""
        self._write = write or _to_stderr


def _to_stderr(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        # Nobody can read it: the descriptor is closed, or the terminal is gone.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - it takes the place of one that is never closed either

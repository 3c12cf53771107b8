# SPDX-License-Identifier: LGPL-2.1-or-later
"""Print a program's own messages, in lines, on a terminal that it may share with a guest."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from ..text import printable


class Messages:
    """Prints lines on standard error, or wherever `redirect` sends them. Imports next to nothing, for the start."""

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
        # Nobody is there to read it; there is no descriptor, or the terminal has gone.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - it takes the place of one that is never closed either

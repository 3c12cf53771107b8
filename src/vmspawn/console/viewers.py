# SPDX-License-Identifier: LGPL-2.1-or-later
"""Shows the console on standard output, and appends its output to a file."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..aio.writer import Writer
from .streams import Output
from .terminal import Screen

if TYPE_CHECKING:
    from .hub import Console


class OutputViewer:
    """Shows the console on a terminal, a pipe, a socket or a file, at the reader's pace.

    The caller keeps the descriptor. The viewer detaches if the reader has ended, or a write to a file fails.
    """

    def __init__(
        self, console: Console, fd: int, screen: Screen | None = None, *, on_failed: Callable[[OSError], None]
    ) -> None:
        """Attach to the console. `screen` tracks the output; `on_failed` is called once if a write to a file fails."""
        self._console = console
        self._on_failed = on_failed
        self._screen = screen
        self._output = Output(fd)
        self._writer = Writer(self._output.fd, self._output.write, on_empty=self._on_empty, on_lost=self._on_lost)
        self._is_finishing = False

    @property
    def is_full(self) -> bool:
        """True while output waits to be written."""
        return self._writer.pending > 0

    def show(self, data: bytes) -> None:
        """Write output."""
        if self._screen is not None:
            self._screen.show(data)
        self._writer.write(data)

    def finish(self) -> bool:
        """Return whether everything has been written; if not, write the rest, and then detach."""
        self._is_finishing = True
        return not self._writer.pending

    def write_last(self, data: bytes) -> None:
        """Write these last bytes, if that does not block."""
        if self._output.fd >= 0 and not self._writer.pending:
            with contextlib.suppress(OSError):
                self._output.write(data)

    def close(self) -> None:
        """Detach at once. May be called again."""
        self._writer.close()
        self._output.close()
        self._console.detach(self)

    def _on_lost(self, error: OSError) -> None:
        self._console.detach(self)
        # A closed pipe is not an error: its reader has read enough.
        if stat.S_ISREG(os.fstat(self._output.fd).st_mode):
            self._on_failed(error)

    def _on_empty(self) -> None:
        if self._is_finishing:
            self._console.detach(self)
        else:
            self._console.viewer_has_room()


def output_failed(error: OSError) -> str:
    """Return the message for a failed standard output."""
    return f"cannot write to standard output: {error.strerror}; the machine continues without it"


class Transcript:
    """Appends the console's output to a file. Owns the descriptor."""

    def __init__(self, console: Console, fd: int, on_failed: Callable[[OSError], None]) -> None:
        """Attach to the console. `on_failed` is called once if a write fails; the transcript then detaches."""
        self._console = console
        self._fd = fd
        self._on_failed = on_failed

    @property
    def is_full(self) -> bool:
        """Always False: each piece is written at once."""
        return False

    def show(self, data: bytes) -> None:
        """Write output."""
        try:
            while data and self._fd >= 0:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            self._close()
            self._on_failed(error)

    def finish(self) -> bool:
        """Close the file. May be called again. Returns True."""
        # A network file system may report a failed write only on close(2).
        if error := self._close():
            self._on_failed(error)
        return True

    def _close(self) -> OSError | None:
        fd, self._fd = self._fd, -1
        self._console.detach(self)
        try:
            if fd >= 0:
                os.close(fd)
        except OSError as error:
            return error
        return None

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Shows the console on our standard output, and writes its transcript to a file."""

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

    The descriptor stays the caller's. The console goes on without it when the reader is gone, or a file is full.
    """

    def __init__(
        self, console: Console, fd: int, screen: Screen | None = None, *, on_failed: Callable[[OSError], None]
    ) -> None:
        """`screen` follows the output; `on_failed` is called once when a file cannot be written any more."""
        self._console = console
        self._on_failed = on_failed
        self._screen = screen
        self._output = Output(fd)
        self._writer = Writer(self._output.fd, self._output.write, on_empty=self._on_empty, on_lost=self._on_lost)
        self._finishing = False

    @property
    def is_full(self) -> bool:
        """Whether output waits to be written."""
        return self._writer.pending > 0

    def show(self, data: bytes) -> None:
        """Write output."""
        if self._screen is not None:
            self._screen.show(data)
        self._writer.write(data)

    def finish(self) -> None:
        """Detach once everything has been written."""
        self._finishing = True
        if not self._writer.pending:
            self._console.detach(self)

    def write_last(self, data: bytes) -> None:
        """Write last bytes, if that is possible without waiting."""
        if self._output.fd >= 0 and not self._writer.pending:
            with contextlib.suppress(OSError):
                self._output.write(data)

    def close(self) -> None:
        """Show no more. May be called again."""
        self._writer.close()
        self._output.close()
        self._console.detach(self)

    def _on_lost(self, error: OSError) -> None:
        self._console.detach(self)
        # A reader that is gone needs no message.
        if stat.S_ISREG(os.fstat(self._output.fd).st_mode):
            self._on_failed(error)

    def _on_empty(self) -> None:
        if self._finishing:
            self._console.detach(self)
        else:
            self._console.viewer_has_room()


def output_failed(error: OSError) -> str:
    """Return a message for an output that failed."""
    return f"cannot write to standard output: {error.strerror}; the machine goes on without"


class Transcript:
    """Appends the console's output to a file. Owns the descriptor."""

    def __init__(self, console: Console, fd: int, on_failed: Callable[[OSError], None]) -> None:
        """`on_failed` is called once, when the file cannot be written any more; the console goes on without it."""
        self._console = console
        self._fd = fd
        self._on_failed = on_failed

    @property
    def is_full(self) -> bool:
        """Never true: a file is written at once."""
        return False

    def show(self, data: bytes) -> None:
        """Write output."""
        try:
            while data and self._fd >= 0:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            self._close()
            self._on_failed(error)

    def finish(self) -> None:
        """Close the file. May be called again."""
        # A network file system may report only now that it is full.
        if error := self._close():
            self._on_failed(error)

    def _close(self) -> OSError | None:
        fd, self._fd = self._fd, -1
        self._console.detach(self)
        try:
            if fd >= 0:
                os.close(fd)
        except OSError as error:
            return error
        return None

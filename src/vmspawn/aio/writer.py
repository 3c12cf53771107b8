# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writing without waiting: what a descriptor does not take at once is kept, in order, until it does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

#: Bytes offered to one write(2). More would only be copied and refused.
_CHUNK = 65536


def _nothing(*_: object) -> None:
    pass


class Outlet:
    """The way out to one descriptor, which stays the caller's and must not block.

    `write` writes to it, returns how much, and raises BlockingIOError where it would have to wait. `on_empty` is called
    when everything kept has been written, `on_lost` once when it cannot be written to any more; what is put then is
    dropped.
    """

    def __init__(
        self,
        fd: int,
        write: Callable[[bytes], int],
        *,
        on_empty: Callable[[], None] = _nothing,
        on_lost: Callable[[OSError], None] = _nothing,
    ) -> None:
        self._fd = fd
        self._write = write
        self._on_empty = on_empty
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._kept = bytearray()
        self._waiting = False
        self._closed = False
        #: Bytes that have been written so far.
        self.written = 0

    @property
    def pending(self) -> int:
        """Bytes that are kept."""
        return len(self._kept)

    def put(self, data: bytes) -> None:
        """Write, or keep for later."""
        if self._closed:
            return
        self._kept += data
        if not self._waiting:
            self._drain()

    def close(self) -> None:
        """Drop what is kept and write no more."""
        if not self._closed:
            self._stop_waiting()
            self._closed = True
            self._kept.clear()

    def _drain(self) -> None:
        try:
            while self._kept:
                count = self._write(bytes(self._kept[:_CHUNK]))
                self.written += count
                del self._kept[:count]
        except BlockingIOError:
            self._wait()
        except OSError as error:
            self.close()
            self._on_lost(error)
        else:
            was_waiting = self._waiting
            self._stop_waiting()
            if was_waiting:
                self._on_empty()

    def _wait(self) -> None:
        if not self._waiting:
            self._waiting = True
            self._loop.add_writer(self._fd, self._drain)

    def _stop_waiting(self) -> None:
        if self._waiting:
            self._waiting = False
            self._loop.remove_writer(self._fd)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Write to a non-blocking descriptor, and queue what it does not take at once.

There are three cases for how data leaves:

1. Nothing waits: the data is written at once. What the descriptor does not take is queued until the event loop reports
   room.
2. Something waits: the data is queued behind it. Small pieces are joined, so that a byte costs a byte.
3. The data is a message with file descriptors, or one that may be withdrawn: it stays apart from all others. Its
   descriptors go along with its first byte.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Sequence

#: Bytes up to which a queued piece grows by those that follow it.
_JOIN_SIZE = 4096


def _ignore(*_: object) -> None:
    pass


class Message:
    """A message that is queued apart from others: all of it, or the part that is not written yet."""

    __slots__ = ("data", "fds", "is_begun", "on_begun")

    def __init__(self, data: bytes, fds: Sequence[int], on_begun: Callable[[], None]) -> None:
        self.data = data
        self.fds = fds
        self.on_begun = on_begun
        #: Whether some of it has been written, its descriptors included.
        self.is_begun = False


class Writer:
    """The write queue of one descriptor, which stays the caller's and must not block.

    `send` writes bytes, returns how many, and raises BlockingIOError if it would have to wait; `send_fds` does so with
    file descriptors, which stay the caller's. `on_empty` is called when everything queued has been written, `on_lost`
    once when the descriptor cannot be written to any more. Data that comes after that, or after `close`, is dropped.
    """

    __slots__ = (
        "_closed", "_fd", "_loop", "_on_empty", "_on_lost", "_queue", "_send", "_send_fds", "_waiting", "pending",
        "written",
    )  # fmt: skip

    def __init__(
        self,
        fd: int,
        send: Callable[[bytes], int],
        send_fds: Callable[[bytes, Sequence[int]], int] | None = None,
        *,
        on_empty: Callable[[], None] = _ignore,
        on_lost: Callable[[OSError], None] = _ignore,
    ) -> None:
        self._fd = fd
        self._send = send
        self._send_fds = send_fds
        self._on_empty = on_empty
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._queue: deque[bytes | Message] = deque()
        self._waiting = False
        self._closed = False
        #: Bytes that are queued, and bytes that have been written so far.
        self.pending = self.written = 0

    @classmethod
    def of_socket(
        cls,
        connected: socket.socket,
        *,
        on_empty: Callable[[], None] = _ignore,
        on_lost: Callable[[OSError], None] = _ignore,
    ) -> Writer:
        """Make the write queue of a connected unix socket."""

        def send_fds(data: bytes, fds: Sequence[int]) -> int:
            return socket.send_fds(connected, [data], fds)

        return cls(connected.fileno(), connected.send, send_fds, on_empty=on_empty, on_lost=on_lost)

    def write(self, data: bytes) -> None:
        """Write, or queue what the descriptor does not take."""
        if self._queue or self._closed:
            return self._append(data)
        try:
            sent = self._send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            return self._lose(error)
        self.written += sent
        if sent < len(data):
            self._append(data[sent:])
            self._drain()

    def _append(self, data: bytes) -> None:
        if self._closed:
            return
        self.pending += len(data)
        last = self._queue[-1] if self._queue else None
        if isinstance(last, bytes) and len(last) + len(data) <= _JOIN_SIZE:
            self._queue[-1] = last + data
        else:
            self._queue.append(data)

    def write_message(self, data: bytes, fds: Sequence[int] = (), *, on_begun: Callable[[], None] = _ignore) -> Message:
        """Write data apart from all other data, `fds` with its first byte; `withdraw` takes it back.

        `fds` must stay open until `on_begun` is called, once: they have left, or never will. That may be at once.
        """
        message = Message(data, fds, on_begun)
        if self._closed:
            on_begun()
            return message
        self.pending += len(data)
        self._queue.append(message)
        if not self._waiting:
            self._drain()
        return message

    def withdraw(self, message: Message) -> bool:
        """Take back a message of which nothing has been written; returns False if some of it has been."""
        if message.is_begun or message not in self._queue:
            return False
        self._queue.remove(message)
        self.pending -= len(message.data)
        message.on_begun()
        return True

    def close(self) -> None:
        """Drop what is queued, and write no more. May be called again."""
        if self._closed:
            return
        self._stop_waiting()
        self._closed = True
        self.pending = 0
        while self._queue:
            first = self._queue.popleft()
            if isinstance(first, Message) and not first.is_begun:
                first.on_begun()

    def _lose(self, error: OSError) -> None:
        self.close()
        self._on_lost(error)

    def _drain(self) -> None:
        """Write what is queued, until the descriptor takes no more."""
        try:
            while self._queue:
                self._write_first(self._queue[0])
        except BlockingIOError:
            if not self._waiting:
                self._waiting = True
                self._loop.add_writer(self._fd, self._drain)
        except OSError as error:
            self._lose(error)
        else:
            if self._waiting:
                self._stop_waiting()
                self._on_empty()

    def _write_first(self, first: bytes | Message) -> None:
        if isinstance(first, bytes):
            data, sent = first, self._send(first)
            rest: bytes | Message = data[sent:]
        else:
            data, rest = first.data, first
            sent = self._begin(first) if not first.is_begun else self._send(data)
            first.data = data[sent:]
        self.written += sent
        self.pending -= sent
        if sent < len(data):
            self._queue[0] = rest
        else:
            self._queue.popleft()

    def _begin(self, message: Message) -> int:
        if message.fds and self._send_fds is not None:
            sent = self._send_fds(message.data, message.fds)
        else:
            sent = self._send(message.data)
        message.is_begun = True
        message.on_begun()
        return sent

    def _stop_waiting(self) -> None:
        if self._waiting:
            self._waiting = False
            self._loop.remove_writer(self._fd)

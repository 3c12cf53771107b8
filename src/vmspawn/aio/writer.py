# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writes to a non-blocking descriptor, and queues data that the descriptor does not accept yet.

There are three cases for how data is written:

1. The queue is empty: the data is written at once. Data that the descriptor does not accept is queued until the event
   loop reports that the descriptor is writable.
2. The queue is not empty: the data is appended. Small pieces are joined, so that the queue needs little memory.
3. The data is a message with file descriptors, or can be withdrawn: it stays separate from other data. Its
   descriptors are sent with its first byte.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Sequence

#: The size in bytes up to which pieces are joined.
_JOIN_SIZE = 4096


def _ignore(*_: object) -> None:
    pass


class Message:
    """A separately queued message, or the part of it that is not written yet."""

    __slots__ = ("data", "fds", "is_begun", "on_begun")

    def __init__(self, data: bytes, fds: Sequence[int], on_begun: Callable[[], None]) -> None:
        self.data = data
        self.fds = fds
        self.on_begun = on_begun
        #: True if a part of the message, including its descriptors, has been written.
        self.is_begun = False


class Writer:
    """The write queue of a non-blocking descriptor. The caller keeps the descriptor.

    `send` writes bytes, returns their number, and raises BlockingIOError if it would block; `send_fds` does the same
    with file descriptors, which the caller keeps. `on_empty` is called when the event loop has emptied the queue, not
    if everything was sent at once. `on_lost` is called once after a failed write. Data after that, or after `close`, is
    dropped.
    """

    __slots__ = (
        "_fd", "_is_closed", "_is_waiting", "_loop", "_on_empty", "_on_lost", "_queue", "_send", "_send_fds",
        "pending", "written",
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
        self._is_waiting = False
        self._is_closed = False
        #: The numbers of queued and of written bytes.
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
        """Write data, and queue the rest that the descriptor does not accept."""
        if self._queue or self._is_closed:
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
        if self._is_closed:
            return
        self.pending += len(data)
        last = self._queue[-1] if self._queue else None
        if isinstance(last, bytes) and len(last) + len(data) <= _JOIN_SIZE:
            self._queue[-1] = last + data
        else:
            self._queue.append(data)

    def write_message(self, data: bytes, fds: Sequence[int] = (), *, on_begun: Callable[[], None] = _ignore) -> Message:
        """Write data as a separate message, and `fds` with its first byte. `withdraw` removes the message.

        `fds` must stay open until `on_begun` is called. It is called once, when `fds` were sent or dropped, perhaps
        before this method returns.
        """
        message = Message(data, fds, on_begun)
        if self._is_closed:
            on_begun()
            return message
        self.pending += len(data)
        self._queue.append(message)
        if not self._is_waiting:
            self._drain()
        return message

    def withdraw(self, message: Message) -> bool:
        """Remove a message from the queue. Returns False if a part of it was written already."""
        if message.is_begun or message not in self._queue:
            return False
        self._queue.remove(message)
        self.pending -= len(message.data)
        message.on_begun()
        return True

    def close(self) -> None:
        """Drop the queue, and stop writing. May be called again."""
        if self._is_closed:
            return
        self._stop_waiting()
        self._is_closed = True
        self.pending = 0
        while self._queue:
            first = self._queue.popleft()
            if isinstance(first, Message) and not first.is_begun:
                first.on_begun()

    def _lose(self, error: OSError) -> None:
        self.close()
        self._on_lost(error)

    def _drain(self) -> None:
        """Write queued data until the descriptor accepts no more."""
        try:
            while self._queue:
                self._write_first(self._queue[0])
        except BlockingIOError:
            if not self._is_waiting:
                self._is_waiting = True
                self._loop.add_writer(self._fd, self._drain)
        except OSError as error:
            self._lose(error)
        else:
            if self._is_waiting:
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
        if self._is_waiting:
            self._is_waiting = False
            self._loop.remove_writer(self._fd)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client's socket on the event loop: a little at a time in, whatever it takes out, and never waiting for it."""

from __future__ import annotations

import asyncio
import os
import select
import socket
from array import array
from collections import deque
from collections.abc import Callable

from ..limits import DRAIN_TIMEOUT, OUTPUT_SIZE, RECEIVE_SIZE

#: Room for one descriptor, and for the one more that alignment makes of it; the kernel closes further ones.
_ANCILLARY = socket.CMSG_SPACE(array("i").itemsize)


class Connection:
    """Owns a connected socket of type SOCK_STREAM, and closes it in `close` or when the client is gone."""

    __slots__ = (
        "_ended", "_gone", "_leaving", "_loop", "_output", "_reading", "_received", "_socket", "waiting", "written",
    )  # fmt: skip

    def __init__(
        self,
        connected: socket.socket,
        *,
        received: Callable[[bytes, int], None],
        ended: Callable[[], None],
        gone: Callable[[], None],
    ) -> None:
        """`received` gets data, and a descriptor that came with the last of it or -1; the descriptor is its to close.

        `ended` is called when the client will send no more, `gone` when it is not there any more or was cut off, but
        not when `close` was called.
        """
        connected.setblocking(False)
        self._socket = connected
        self._loop = asyncio.get_running_loop()
        self._received = received
        self._ended = ended
        self._gone = gone
        self._reading = False
        self._leaving = False
        self._output: deque[bytes] = deque()
        #: Bytes that the client has not taken yet, and all that were ever for it.
        self.waiting = self.written = 0

    # In.

    def read(self, wanted: bool) -> None:
        """Receive from now on, or do not."""
        if wanted is not self._reading and self._socket.fileno() >= 0:
            self._reading = wanted
            if wanted:
                self._loop.add_reader(self._socket, self._readable)
            else:
                self._loop.remove_reader(self._socket)

    def _readable(self) -> None:
        try:
            data, ancillary, _, _ = self._socket.recvmsg(RECEIVE_SIZE, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            return self._lost()
        fd = _first_descriptor(ancillary) if ancillary else -1
        if data:
            return self._received(data, fd)
        self.read(False)
        # Both directions are down: the client did not just stop writing.
        if _hung_up(self._socket):
            return self._lost()
        self._ended()

    # Out.

    def write(self, data: bytes) -> None:
        """Send, or queue what the client does not take. One that leaves too much lying is cut off."""
        self.written += len(data)
        if self._output:
            if self.waiting >= OUTPUT_SIZE:
                return self._lost()
            sent = 0
        else:
            try:
                sent = self._socket.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                return self._lost()
        if sent < len(data):
            self._queue(data[sent:])

    def _queue(self, data: bytes) -> None:
        if not self._output:
            self._loop.add_writer(self._socket, self._writable)
        self._output.append(data)
        self.waiting += len(data)

    def _writable(self) -> None:
        while self._output:
            data = self._output[0]
            try:
                sent = self._socket.send(data)
            except BlockingIOError:
                return
            except OSError:
                return self._lost()
            self.waiting -= sent
            if sent < len(data):
                self._output[0] = data[sent:]
                return
            self._output.popleft()
        self._loop.remove_writer(self._socket)
        if self._leaving:
            self._lost()

    # The end.

    def finish(self) -> None:
        """Close when the client has what waits for it, or does not take it in time; `gone` is called then."""
        self.read(False)
        self._leaving = True
        if self._output:
            self._loop.call_later(DRAIN_TIMEOUT, self._lost)
        else:
            self._loop.call_soon(self._lost)

    def _lost(self) -> None:
        if self._socket.fileno() >= 0:
            self.close()
            self._gone()

    def close(self) -> None:
        """Close at once."""
        if self._socket.fileno() < 0:
            return
        self.read(False)
        self._loop.remove_writer(self._socket)
        _discard_input(self._socket)
        self._socket.close()
        self._output.clear()
        self.waiting = 0


def _first_descriptor(ancillary: list[tuple[int, int, bytes]]) -> int:
    """The first descriptor that came, or -1; QEMU takes no more than that either. The others are closed."""
    fds = array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    for fd in fds[1:]:
        os.close(fd)
    return fds[0] if fds else -1


def _hung_up(connected: socket.socket) -> bool:
    poll = select.poll()
    poll.register(connected, 0)
    return any(event & select.POLLHUP for _, event in poll.poll(0))


def _discard_input(connected: socket.socket) -> None:
    """Read what is there, for closing with unread data makes the client's next read fail instead of end."""
    try:
        while connected.recv(RECEIVE_SIZE):
            pass
    except OSError:
        pass

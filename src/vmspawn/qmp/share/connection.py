# SPDX-License-Identifier: LGPL-2.1-or-later
"""Serves a client's socket on the event loop, with bounded reads and a write queue."""

from __future__ import annotations

import asyncio
import os
import socket
from array import array
from collections.abc import Callable

from ...aio.sockets import has_hung_up
from ...aio.writer import Writer
from .. import limits
from ..limits import RECEIVE_SIZE

#: Room for one descriptor, which alignment extends to two. The kernel closes further ones.
_ANCILLARY = socket.CMSG_SPACE(array("i").itemsize)


class Connection:
    """A client's connection. Owns a socket of type SOCK_STREAM; `close` or the client's disconnect closes it."""

    __slots__ = (
        "_is_leaving", "_is_reading", "_loop", "_on_drained", "_on_end", "_on_gone", "_on_received", "_send",
        "_socket", "_writer", "written",
    )  # fmt: skip

    def __init__(
        self,
        connected: socket.socket,
        *,
        on_received: Callable[[bytes, int], None],
        on_end: Callable[[], None],
        on_drained: Callable[[], None],
        on_gone: Callable[[], None],
    ) -> None:
        """Begin to read.

        `on_received` gets data, and the descriptor that came with the data's last byte, or -1; `on_received` owns the
        descriptor. `on_end` is called when the client has closed its sending side, `on_drained` when the client has
        read all queued output, `on_gone` when the client has hung up or was disconnected, but not after `close`.
        """
        connected.setblocking(False)
        self._socket = connected
        self._loop = asyncio.get_running_loop()
        self._on_received = on_received
        self._on_end = on_end
        self._on_drained = on_drained
        self._on_gone = on_gone
        self._is_reading = False
        self._is_leaving = False
        self._writer = Writer.of_socket(connected, on_empty=self._on_empty, on_lost=self._on_lost)
        self._send = self._writer.write
        #: The number of bytes that were written or queued for the client.
        self.written = 0

    @property
    def waiting(self) -> int:
        """The number of bytes that are queued for the client, without those in the socket's buffer."""
        return self._writer.pending

    # Input.

    def read(self, is_wanted: bool) -> None:
        """Start or stop receiving."""
        if is_wanted is not self._is_reading and self._socket.fileno() >= 0:
            self._is_reading = is_wanted
            if is_wanted:
                self._loop.add_reader(self._socket, self._readable)
            else:
                self._loop.remove_reader(self._socket)

    def _readable(self) -> None:
        try:
            data, ancillary, _, _ = self._socket.recvmsg(RECEIVE_SIZE, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            return self._lose()
        fd = _first_descriptor(ancillary) if ancillary else -1
        if data:
            return self._on_received(data, fd)
        self.read(False)
        if has_hung_up(self._socket):
            return self._lose()
        self._on_end()

    # Output.

    def write(self, data: bytes) -> None:
        """Send data, or queue it until the client reads. Disconnects a client with too much unread output."""
        self.written += len(data)
        if self._writer.pending >= limits.OUTPUT_SIZE:
            return self._lose()
        self._send(data)

    def _on_empty(self) -> None:
        if self._is_leaving:
            self._lose()
        else:
            self._on_drained()

    def _on_lost(self, _error: OSError) -> None:
        self._lose()

    # The end.

    def finish(self, *, timeout: float | None) -> None:
        """Close when the client has read all queued output, or after `timeout` seconds; then calls `on_gone`."""
        self.read(False)
        self._is_leaving = True
        if not self._writer.pending:
            self._loop.call_soon(self._lose)
        elif timeout is not None:
            self._loop.call_later(timeout, self._lose)

    def _lose(self) -> None:
        if self._socket.fileno() >= 0:
            self.close()
            self._on_gone()

    def close(self) -> None:
        """Close the socket at once. It is safe to call this again."""
        if self._socket.fileno() < 0:
            return
        self.read(False)
        self._writer.close()
        _discard_input(self._socket)
        self._socket.close()


def _first_descriptor(ancillary: list[tuple[int, int, bytes]]) -> int:
    """Return the first received descriptor, or -1, and close the others: QEMU accepts only one."""
    fds = array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    for fd in fds[1:]:
        os.close(fd)
    return fds[0] if fds else -1


def _discard_input(connected: socket.socket) -> None:
    """Discard unread input: closing a socket with unread input makes the client's next read fail."""
    try:
        while connected.recv(RECEIVE_SIZE):
            pass
    except OSError:
        pass

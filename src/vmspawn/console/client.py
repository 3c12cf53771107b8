# SPDX-License-Identifier: LGPL-2.1-or-later
"""Serves one client of the console's socket: sends it the output, and passes its input to the guest."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from ..aio.sockets import has_hung_up
from ..aio.writer import Writer

#: Bytes queued for a client, beyond its socket's buffer, at which the console waits for the client.
UNREAD_MAX = 256 * 1024

#: Seconds after which a client that reads nothing is disconnected, because the guest waits for it. A slow client that
#: still reads stays connected.
STALL_TIMEOUT = 5.0

_RECEIVE_SIZE = 65536


class ConsoleClient:
    """One client's connection. Owns the socket."""

    def __init__(
        self,
        connected: socket.socket,
        *,
        on_input: Callable[[bytes, Callable[[], None]], None],
        on_room: Callable[[], None],
        on_closed: Callable[[ConsoleClient], None],
    ) -> None:
        """Start to serve the client.

        `on_input` gets the client's input, and a function to call when more input is accepted. `on_room` is called when
        the client has read everything, and `on_closed` once when the connection is closed.
        """
        connected.setblocking(False)
        self._socket = connected
        self._on_input = on_input
        self._on_room = on_room
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._writer = Writer.of_socket(connected, on_empty=self._on_empty, on_lost=lambda _: self.close())
        self._is_finishing = False
        self._stall: asyncio.TimerHandle | None = None
        self._loop.add_reader(connected, self._readable)

    @property
    def is_full(self) -> bool:
        """True while the console has to wait for this client."""
        return self._writer.pending > UNREAD_MAX

    def show(self, data: bytes) -> None:
        """Send output."""
        self._writer.write(data)
        if self.is_full and self._stall is None:
            self._watch(self._writer.written)

    def finish(self) -> bool:
        """Close the connection after all output has been sent. Returns True if it is closed already."""
        self._is_finishing = True
        if not self._writer.pending:
            self.close()
            return True
        if self._stall is None:
            self._watch(self._writer.written)
        return False

    def close(self) -> None:
        """Disconnect at once. May be called again."""
        if self._socket.fileno() < 0:
            return
        if self._stall is not None:
            self._stall.cancel()
        self._writer.close()
        self._loop.remove_reader(self._socket)
        self._socket.close()
        self._on_closed(self)

    def _on_empty(self) -> None:
        if self._is_finishing:
            self.close()
        else:
            self._on_room()

    def _watch(self, written: int) -> None:
        """Check after STALL_TIMEOUT whether the client has read anything since."""
        self._stall = self._loop.call_later(STALL_TIMEOUT, self._stalled, written)

    def _stalled(self, before: int) -> None:
        self._stall = None
        if not self.is_full and not self._is_finishing:
            return
        if self._writer.written == before:
            self.close()
        else:
            self._watch(self._writer.written)

    def _readable(self) -> None:
        try:
            data = self._socket.recv(_RECEIVE_SIZE)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        self._loop.remove_reader(self._socket)
        if data:
            self._on_input(data, self._go_on)
        elif has_hung_up(self._socket):
            self.close()

    def _go_on(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.add_reader(self._socket, self._readable)

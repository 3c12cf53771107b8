# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client of the console's socket: sees the console, and what it sends is typed."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..aio.writer import Outlet

if TYPE_CHECKING:
    from .hub import Console

#: Bytes that a client may leave unread, beside those in its socket, before the console waits for it.
UNREAD_MAX = 256 * 1024

#: Seconds that the console waits for a client which takes nothing at all. A slow one goes on for ever; this one hangs,
#: and would hang the guest.
STALL_TIMEOUT = 5.0

_RECEIVE_SIZE = 65536


class ConsoleClient:
    """One connection. Owns the socket; `gone` is called once when it is closed."""

    def __init__(self, connected: socket.socket, console: Console, gone: Callable[[ConsoleClient], None]) -> None:
        connected.setblocking(False)
        self._socket: socket.socket | None = connected
        self._console = console
        self._gone = gone
        self._loop = asyncio.get_running_loop()
        self._outlet = Outlet(connected.fileno(), connected.send, on_empty=self._caught_up, on_lost=self._lost)
        self._finishing = False
        self._stall: asyncio.TimerHandle | None = None
        self._loop.add_reader(connected, self._readable)

    @property
    def full(self) -> bool:
        """Whether the console has to wait for this client."""
        return self._outlet.pending > UNREAD_MAX

    def show(self, data: bytes) -> None:
        """Send output."""
        self._outlet.put(data)
        if self.full and self._stall is None:
            self._watch(self._outlet.written)

    def finish(self) -> None:
        """Close once everything has been sent."""
        self._finishing = True
        if not self._outlet.pending:
            self.close()
        elif self._stall is None:
            self._watch(self._outlet.written)

    def close(self) -> None:
        """Disconnect at once. May be called again."""
        if self._socket is None:
            return
        if self._stall is not None:
            self._stall.cancel()
        self._outlet.close()
        self._loop.remove_reader(self._socket)
        self._socket.close()
        self._socket = None
        self._gone(self)
        self._console.detach(self)

    def _lost(self, _error: OSError) -> None:
        self.close()

    def _caught_up(self) -> None:
        if self._finishing:
            self.close()
        else:
            self._console.viewer_has_room()

    def _watch(self, written: int) -> None:
        """Look again in a while whether the client has taken anything since."""
        self._stall = self._loop.call_later(STALL_TIMEOUT, self._stalled, written)

    def _stalled(self, before: int) -> None:
        self._stall = None
        if not self.full and not self._finishing:
            return
        if self._outlet.written == before:
            self.close()
        else:
            self._watch(self._outlet.written)

    def _readable(self) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(_RECEIVE_SIZE)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        self._loop.remove_reader(self._socket)
        if data:
            self._console.type(data)
            self._console.when_input_has_room(self._go_on)
        elif self._hung_up():
            self.close()

    def _go_on(self) -> None:
        if self._socket is not None:
            self._loop.add_reader(self._socket, self._readable)

    def _hung_up(self) -> bool:
        """Whether the client is gone altogether; one that only sends no more still wants to see."""
        poll = select.poll()
        with contextlib.suppress(OSError):
            assert self._socket is not None
            poll.register(self._socket, 0)
            return any(event & select.POLLHUP for _, event in poll.poll(0))
        return True

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Talk to the agent in the guest through its control port (docs/agent.md).

There are three cases for how a session begins:

1. The agent is not up yet: `sync` waits in the port until the agent opens it.
2. The agent is up: it answers `sync` with the nonce.
3. The agent was started again, or the guest was: it reports so by a `ready` without a nonce, and gets `sync` again.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable

from .. import log
from ..agent import protocol
from ..agent.protocol import ControlMessage, Lost, Malformed, Pong, Ready, Refused
from ..aio.writer import Writer
from ..errors import NotConnected, NotSupported

_RECEIVE_SIZE = 4096

#: Seconds without reading after as much as `_RECEIVE_SIZE`. An honest agent sends a few lines for each command.
_FLOOD_PAUSE = 0.05


class Agent:
    """The connection to the agent of one machine. It is made when it is first needed."""

    def __init__(
        self,
        connect: Callable[[], socket.socket],
        *,
        on_message: Callable[[Refused | Lost], None],
        on_restart: Callable[[], None],
    ) -> None:
        """`connect` returns a connection to the port. Raises OSError.

        `on_message` gets what is about one command. `on_restart` is called when the agent has forgotten the commands
        that it was told of.
        """
        self._connect = connect
        self._on_message = on_message
        self._on_restart = on_restart
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None
        self._writer: Writer | None = None
        self._reader = protocol.control_reader()
        self._pongs: dict[str, asyncio.Future[None]] = {}
        self._in_session = asyncio.Event()
        self._version = protocol.VERSION
        #: The nonce of the session, which each command names.
        self.session = ""

    async def ready(self) -> None:
        """Wait until the agent is in a session, for as long as it takes.

        Raises NotConnected if its port cannot be reached, NotSupported if the agent is of another version.
        """
        if self._socket is None:
            self._open()
        await self._in_session.wait()
        if self._version != protocol.VERSION:
            raise NotSupported(
                f"the agent in the guest speaks version {self._version} of its protocol, not {protocol.VERSION}",
                hint="install the agent of this vmspawn in the guest; see: vmctl help agent",
            )

    def send(self, message: bytes) -> None:
        """Send a message. Without a connection it is dropped."""
        if self._writer is not None:
            self._writer.write(message)

    async def ping(self, timeout: float) -> bool:
        """Wait until the agent has answered; False if it does not in time."""
        nonce, pong = os.urandom(4).hex(), self._loop.create_future()
        self._pongs[nonce] = pong
        self.send(protocol.ping(nonce))
        try:
            async with asyncio.timeout(timeout):
                await pong
        except TimeoutError:
            return False
        finally:
            del self._pongs[nonce]
        return True

    def restart(self) -> None:
        """Forget the connection: the guest was reset. The next session begins on a new one."""
        self.close()
        self._reader = protocol.control_reader()

    def close(self) -> None:
        """Close the connection. May be called again."""
        self._in_session.clear()
        if self._socket is not None and self._writer is not None:
            self._writer.close()
            self._loop.remove_reader(self._socket)
            self._socket.close()
            self._socket = self._writer = None

    def _open(self) -> None:
        try:
            self._socket = self._connect()
        except OSError as error:
            raise NotConnected(f"cannot reach the agent's port: {error.strerror}") from None
        self._writer = Writer.of_socket(self._socket, on_lost=lambda _: self.close())
        self._loop.add_reader(self._socket, self._readable)
        self._begin_session()

    def _begin_session(self) -> None:
        self._in_session.clear()
        self.session = os.urandom(8).hex()
        self.send(protocol.sync(self.session))

    def _readable(self) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(_RECEIVE_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        if len(data) == _RECEIVE_SIZE:
            self._pause()
        for message in self._reader.feed(data):
            self._handle(message)

    def _pause(self) -> None:
        """Read no more for a moment: a guest may send without end."""
        paused = self._socket
        assert paused is not None
        self._loop.remove_reader(paused)

        def resume() -> None:
            if self._socket is paused:
                self._loop.add_reader(paused, self._readable)

        self._loop.call_later(_FLOOD_PAUSE, resume)

    def _handle(self, message: ControlMessage | Malformed) -> None:
        match message:
            case Ready(nonce=None):
                self._announced()
            case Ready(nonce=self.session):
                self._version = message.version
                self._in_session.set()
            case Pong():
                pong = self._pongs.get(message.nonce)
                if pong is not None and not pong.done():
                    pong.set_result(None)
            case Refused() | Lost():
                self._on_message(message)
            case Malformed():
                log.debug(f"the agent sent what is no message: {message.line!r}")

    def _announced(self) -> None:
        """The agent has been started. It may or may not have got the `sync` that waited for it."""
        if self._in_session.is_set():
            self._begin_session()
            self._on_restart()
        else:
            self.send(protocol.sync(self.session))

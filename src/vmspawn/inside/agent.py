# SPDX-License-Identifier: LGPL-2.1-or-later
"""Talks to the agent in the guest through its control port (docs/agent.md).

There are four cases for how a session begins:

1. The agent is not up yet: `sync` waits in the port until the agent opens it.
2. The agent is up: it answers `sync` with the nonce.
3. The agent or the guest was restarted: the agent sends `ready` without a nonce, and gets `sync` again.
4. The answer to `sync` is lost: `sync` is sent again after a while. In a copy, some time passes before the guest's
   kernel notices that the source's manager has disconnected and the copy's manager has connected. In between, the
   agent can receive, but not send.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable

from .. import log
from ..agent import protocol
from ..agent.protocol import Connected, ControlMessage, Done, Forked, Lost, Malformed, Ports, Ready, Refused
from ..aio.waiting import first_of
from ..aio.writer import Writer
from ..errors import NotConnected, NotSupported

_RECEIVE_SIZE = 4096

#: Seconds between two requests for the number of ports: the first interval, and the longest one for a busy guest.
_COUNT_INTERVAL = 0.005
_COUNT_INTERVAL_MAX = 0.2

#: Seconds after which `sync` is sent again: the first interval, and the longest one for a guest that boots.
_SYNC_INTERVAL = 1.0
_SYNC_INTERVAL_MAX = 10.0

#: Seconds after which a question is asked again: the agent drops an answer that it cannot send within a second.
_ASK_AGAIN = 5.0

#: Seconds. A longer wait for one answer counts only so much towards a timeout.
_ANSWER_MAX = 1.0

#: Seconds between two attempts to connect while QEMU's queue of connections is full.
_CONNECT_INTERVAL = 0.05

#: Seconds between two pings of an agent that does not answer.
_PING_INTERVAL = 0.5

#: Seconds without reading after a read of `_RECEIVE_SIZE` bytes. An honest agent sends a few lines for each command.
_FLOOD_PAUSE = 0.05


class Agent:
    """The connection to the agent of one machine. The first use opens the connection."""

    def __init__(
        self,
        connect: Callable[[], socket.socket],
        *,
        on_message: Callable[[Refused | Done | Lost], None],
        on_restart: Callable[[], None],
    ) -> None:
        """Prepare a connection. `connect` returns a new connection to the port, or raises OSError.

        If `connect` raises BlockingIOError, because QEMU's queue of connections is full, it is called again later.

        `on_message` gets each message about a command. `on_restart` is called when the agent was restarted, and may not
        know the commands that were sent.
        """
        self._connect = connect
        self._on_message = on_message
        self._on_restart = on_restart
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None
        self._writer: Writer | None = None
        self._reader = protocol.control_reader()
        #: Open questions for the number of a set's ports: the kind of answer, the set, and the number.
        self._questions: list[tuple[type[Ports | Connected], str, asyncio.Future[int]]] = []
        self._in_session = asyncio.Event()
        #: Set when the connection is lost or closed.
        self._disconnected = asyncio.Event()
        self._is_closed = False
        #: The next attempt to connect, while QEMU's queue of connections is full.
        self._next_attempt: asyncio.TimerHandle | None = None
        #: The number of received messages.
        self.heard = 0
        self._next_message = asyncio.Event()
        self._version = protocol.VERSION
        self._capabilities: frozenset[str] = frozenset()
        #: The seed that was sent to the agent of a copy, and the agent's answer.
        self._seed = ""
        self._forked: asyncio.Future[None] = self._loop.create_future()
        #: The nonce of the session, which each command names.
        self.session = ""
        #: The last `sync` has left the write queue when the writer has written so many bytes.
        self._sync_end = 0

    async def ready(self) -> None:
        """Wait until the agent is in a session, for as long as it takes.

        Raises NotConnected if the agent's port cannot be reached, or after `close`; NotSupported if the agent has
        another version.
        """
        interval = _SYNC_INTERVAL
        while not self._in_session.is_set():
            if self._socket is None:
                self._open()
            asked = self.session
            await first_of(self._in_session, self._disconnected, timeout=interval)
            if self.session == asked and not self._in_session.is_set():
                self._sync_again()
                interval = min(interval * 2, _SYNC_INTERVAL_MAX)
        if self._version != protocol.VERSION:
            raise NotSupported(
                f"the agent in the guest speaks version {self._version} of its protocol, not {protocol.VERSION}",
                hint="install the agent of this vmspawn in the guest; see: vmctl help agent",
            )

    def send(self, message: bytes) -> None:
        """Send a message. Without a connection, the message is dropped."""
        if self._writer is not None:
            self._writer.write(message)

    async def wake_copy(self) -> None:
        """Set the clock and the random seed of a copy's guest; waits for as long as the agent takes.

        Raises NotSupported if the agent cannot do that, or an error of `ready`.
        """
        await self.ready()
        if "fork" not in self._capabilities:
            raise NotSupported("the agent in the guest is too old to set the clock of a copy")
        self._seed = os.urandom(32).hex()
        self._forked = self._loop.create_future()
        self.send(protocol.fork(self._seed, time.time_ns()))
        await self._forked

    async def knows_ports(self, ports: str, count: int, timeout: float) -> bool:
        """Wait until the guest knows exactly `count` ports of a set. Returns False after `timeout` seconds.

        The timeout starts again when the number of ports changes. The wait for each answer uses at most `_ANSWER_MAX`
        seconds of the timeout, because a guest that is too busy to run the agent is also too busy to notice ports.
        """
        return await self._until(Ports, ports, protocol.count_ports(ports), count, timeout)

    async def has_connected(self, ports: str, count: int, timeout: float) -> bool:
        """Wait until `count` ports of an unused set are connected. Returns False as `knows_ports` does."""
        return await self._until(Connected, ports, protocol.count_connected(ports), count, timeout)

    async def _until(
        self, kind: type[Ports | Connected], ports: str, question: bytes, count: int, timeout: float
    ) -> bool:
        interval, left, before = _COUNT_INTERVAL, timeout, -1
        while True:
            asked = self._loop.time()
            counted = await self._count(kind, ports, question)
            if counted == count:
                return True
            if counted != before:
                before, left = counted, timeout
            left -= min(self._loop.time() - asked, _ANSWER_MAX) + interval
            if left <= 0:
                return False
            await asyncio.sleep(interval)
            interval = min(interval * 1.5, _COUNT_INTERVAL_MAX)

    async def answers(self) -> None:
        """Wait until the agent answers, for as long as it takes: a killed agent is started again."""
        before = self.heard
        while self.heard == before:
            # The guest may be reset meanwhile, which closes the connection.
            await self.ready()
            # No second ping is sent before the guest has received the first.
            if self._writer is not None and not self._writer.pending:
                self.send(protocol.ping("answer"))
            await first_of(self._next_message, timeout=_PING_INTERVAL)

    def _ask_again(self) -> None:
        """Answer the open questions with -1, so that they are sent again: their agent may have been killed."""
        for _, _, counted in self._questions:
            if not counted.done():
                counted.set_result(-1)

    async def _count(self, kind: type[Ports | Connected], ports: str, question: bytes) -> int:
        if self._is_closed:
            raise _closed()
        # There may be two questions for the same set: a reset unplugs a set that is being connected.
        counted: asyncio.Future[int] = self._loop.create_future()
        asked = (kind, ports, counted)
        self._questions.append(asked)
        try:
            while not counted.done():
                # The question is not sent again before the guest has received it.
                if self._writer is not None and not self._writer.pending:
                    self.send(question)
                await asyncio.wait({counted}, timeout=_ASK_AGAIN)
            return counted.result()
        finally:
            self._questions.remove(asked)

    def _on_count(self, message: Ports | Connected) -> None:
        for kind, ports, counted in self._questions:
            if isinstance(message, kind) and message.id == ports and not counted.done():
                counted.set_result(message.count)

    def restart(self) -> None:
        """Begin a session on a new connection, after a reset of the guest. Callers of `ready` wait for the session."""
        was_open = self._socket is not None
        self._disconnect()
        self._reader = protocol.control_reader()
        if was_open:
            with contextlib.suppress(NotConnected):
                self._open()

    def close(self) -> None:
        """Close the connection permanently: callers of `ready` get NotConnected. May be called again."""
        self._is_closed = True
        self._disconnect()
        for _, _, counted in self._questions:
            if not counted.done():
                counted.set_exception(_closed())

    def _disconnect(self) -> None:
        self._in_session.clear()
        self._disconnected.set()
        if self._socket is not None and self._writer is not None:
            self._writer.close()
            self._loop.remove_reader(self._socket)
            self._socket.close()
            self._socket = self._writer = None

    def _open(self) -> None:
        """Connect and begin a session, at once or as soon as QEMU's queue has room. Raises NotConnected."""
        if self._is_closed:
            raise _closed()
        self._disconnected.clear()
        try:
            connected = self._connect()
        except BlockingIOError:
            # QEMU's queue holds two connections, also those that were closed again. It is full if a guest is reset
            # several times before QEMU accepts the connection of the first reset.
            if self._next_attempt is None:
                self._next_attempt = self._loop.call_later(_CONNECT_INTERVAL, self._open_again)
            return
        except OSError as error:
            raise NotConnected(f"cannot reach the agent's port: {error.strerror}") from None
        self._socket = connected
        self._writer = Writer.of_socket(connected, on_lost=lambda _: self._disconnect())
        self._loop.add_reader(connected, self._on_readable, connected)
        self._begin_session()

    def _open_again(self) -> None:
        self._next_attempt = None
        if self._socket is None and not self._is_closed:
            try:
                self._open()
            except NotConnected:
                # Callers of `ready` try it themselves, and raise the error.
                self._disconnected.set()

    def _begin_session(self) -> None:
        self._in_session.clear()
        self.session = os.urandom(8).hex()
        self._sync()

    def _sync(self) -> None:
        self.send(protocol.sync(self.session))
        if self._writer is not None:
            self._sync_end = self._writer.written + self._writer.pending

    def _sync_again(self) -> None:
        """Repeat `sync`, unless it is still in the write queue. The agent answers both, and begins only one session."""
        if self._writer is not None and not self._writer.pending:
            self._sync()

    def _on_readable(self, connected: socket.socket) -> None:
        try:
            data = connected.recv(_RECEIVE_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._disconnect()
            return
        if len(data) == _RECEIVE_SIZE:
            self._pause(connected)
        for message in self._reader.feed(data):
            self._handle(message)

    def _pause(self, connected: socket.socket) -> None:
        """Read nothing for a moment: a guest may send without end."""
        self._loop.remove_reader(connected)

        def resume() -> None:
            if self._socket is connected:
                self._loop.add_reader(connected, self._on_readable, connected)

        self._loop.call_later(_FLOOD_PAUSE, resume)

    def _handle(self, message: ControlMessage | Malformed) -> None:
        self.heard += 1
        self._next_message.set()
        self._next_message = asyncio.Event()
        match message:
            case Ready(nonce=None):
                self._on_announced()
            case Ready(nonce=self.session):
                self._version = message.version
                self._capabilities = message.capabilities
                self._in_session.set()
                self._ask_again()
            case Ports() | Connected():
                self._on_count(message)
            case Forked(seed=self._seed) if not self._forked.done():
                self._forked.set_result(None)
            case Refused(id=self._seed) if not self._forked.done():
                why = os.strerror(message.errno)
                self._forked.set_exception(NotSupported(f"the guest refuses to set its {message.what}: {why}"))
            case Refused() | Done() | Lost():
                self._on_message(message)
            case Malformed():
                log.debug(f"the agent sent an invalid message: {message.line!r}")

    def _on_announced(self) -> None:
        """Send `sync` to an agent that has just started, which may have missed the `sync` that waited in the port.

        A `sync` that is still in the write queue will reach the agent, so no second `sync` is queued. Otherwise a guest
        that announces agents and does not read could let the queue grow without end.
        """
        if self._in_session.is_set():
            self._begin_session()
            self._on_restart()
        elif self._writer is not None and self._writer.written >= self._sync_end:
            self._sync()


def _closed() -> NotConnected:
    return NotConnected("the connection to the agent was closed")

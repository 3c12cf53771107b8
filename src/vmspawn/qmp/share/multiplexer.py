# SPDX-License-Identifier: LGPL-2.1-or-later
"""Shares one QEMU among any number of QMP clients, each of which sees a monitor of its own."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial

from ...errors import NotConnected, SystemFailure, Timeout
from ..limits import DRAIN_TIMEOUT, GREETING_TIMEOUT, SESSIONS
from ..saving import Saving
from ..syntax.envelope import Command
from ..syntax.replies import Reply
from ..transcript import Transcript
from . import descriptors
from .descriptors import Descriptors
from .negotiation import Negotiated, negotiate
from .peer import Peer
from .schedule import Schedule
from .session import Session, Shared, State
from .upstream import Call, Upstream


class Multiplexer:
    """One of QEMU's monitors, shared among sessions. `connect` makes a multiplexer; `close` must follow.

    `on_lost` is called once, with the reason, when QEMU has closed a monitor; the sessions end then. `on_names` is
    called when `names` has changed, before the command with a new name is sent. `may_spawn` is false if QEMU's sandbox
    forbids QEMU to start programs; sessions then refuse commands that start one (`sandbox.py`).
    """

    def __init__(
        self,
        main: Negotiated,
        bulk: Negotiated | None,
        *,
        on_lost: Callable[[str], None],
        on_names: Callable[[], None] = lambda: None,
        transcript: Transcript | None = None,
        may_spawn: bool = True,
        saving: Saving | None = None,
    ) -> None:
        self._on_lost = on_lost
        self._main = Upstream(
            main, on_event=self._on_event, on_lost=self._on_monitor_lost, transcript=transcript, name="sessions"
        )
        self._bulk = None
        if bulk is not None:
            self._bulk = Upstream(
                bulk, on_event=lambda line: None, on_lost=self._on_monitor_lost, transcript=transcript, name="bulk"
            )
        self._schedule = Schedule(self._main, self._bulk, oob=main.greeting.has_oob)
        self._descriptors = Descriptors(on_change=on_names)
        self._shared = Shared(main.greeting, self._schedule, self._descriptors, saving or Saving(), may_spawn)
        # The sessions, in the order of opening. A closed session stays while one of its commands is in flight.
        self._sessions: dict[Session, None] = {}
        # The number of vmspawn's commands in flight; the event is set if it is zero.
        self._own = 0
        self._settled = asyncio.Event()
        self._settled.set()
        self._end = ""

    @classmethod
    async def connect(
        cls,
        connected: socket.socket,
        bulk: socket.socket | None = None,
        *,
        on_lost: Callable[[str], None],
        on_names: Callable[[], None] = lambda: None,
        transcript: Transcript | None = None,
        may_spawn: bool = True,
        saving: Saving | None = None,
        timeout: float = GREETING_TIMEOUT,
    ) -> Multiplexer:
        """Wait for QEMU's greeting, negotiate, and return a multiplexer.

        Owns both sockets, even if this raises. Sessions share the monitor at `connected`. Large commands go to a second
        monitor, at `bulk`; without it, a large command delays all sessions while QEMU reads it. Raises Timeout if a
        monitor sends no greeting within `timeout` seconds, because another program uses it. Raises NotConnected if QEMU
        has exited, or if the socket does not belong to a QMP monitor.
        """
        try:
            main = await negotiate(connected, timeout=timeout)
            second = await negotiate(bulk, timeout=timeout) if bulk is not None else None
        except BaseException:
            for each in filter(None, (connected, bulk)):
                each.close()
            raise
        return cls(
            main, second, on_lost=on_lost, on_names=on_names, transcript=transcript, may_spawn=may_spawn, saving=saving
        )

    def open(
        self,
        connected: socket.socket,
        *,
        read_only: bool = False,
        peer: Peer | None = None,
        initial: bytes = b"",
    ) -> Session:
        """Serve a client on this socket, beginning with the greeting.

        Owns the socket, even if this raises. `peer` describes the client, `initial` is input that was read from the
        socket already. A read-only session refuses commands that may change something (`read_only.py`). Raises
        NotConnected after the multiplexer's end, or SystemFailure if there are too many sessions.
        """
        if self._end:
            connected.close()
            raise NotConnected(self._end)
        if len(self._sessions) >= SESSIONS:
            connected.close()
            raise SystemFailure(f"cannot open more than {SESSIONS} QMP sessions", errno.EUSERS)
        session = Session(
            connected, self._shared, on_left=self._on_left, read_only=read_only, peer=peer, initial=initial
        )
        if session.state is not State.CLOSED:
            self._sessions[session] = None
        return session

    @property
    def sessions(self) -> tuple[Session, ...]:
        """The sessions whose clients are connected, the oldest first."""
        return tuple(session for session in self._sessions if session.state is not State.CLOSED)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of `getfd` that sessions hold in QEMU."""
        return self._descriptors.all_names

    async def close_names(self, names: Iterable[str]) -> None:
        """Close names that sessions of another manager left in QEMU. Ignores missing names.

        Raises Timeout if QEMU does not answer.
        """
        for name in {*names, descriptors.SPARE}:
            self._execute(descriptors.closefd(name), lambda reply: None)
        try:
            async with asyncio.timeout(DRAIN_TIMEOUT):
                await self._settled.wait()
        except TimeoutError:
            raise Timeout(f"QEMU did not close the descriptors of former sessions within {DRAIN_TIMEOUT:g} s") from None

    @contextlib.asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Hold the sessions' commands. Enters the context when QEMU has answered all commands that it was sent.

        Raises Timeout if QEMU does not answer within DRAIN_TIMEOUT.
        """
        drained = asyncio.Event()
        self._schedule.hold(drained.set)
        try:
            try:
                async with asyncio.timeout(DRAIN_TIMEOUT):
                    await drained.wait()
            except TimeoutError:
                raise Timeout(
                    f"QEMU has not answered a command of a QMP session within {DRAIN_TIMEOUT:g} s",
                    hint="try again later",
                ) from None
            yield
        finally:
            if not self._end:
                self._schedule.release()

    async def close(self) -> None:
        """Close the sessions and, within DRAIN_TIMEOUT, their descriptors in QEMU; then close the monitors."""
        for session in tuple(self._sessions):
            session.close()
        if not self._end:
            try:
                async with asyncio.timeout(DRAIN_TIMEOUT):
                    await self._settled.wait()
            except TimeoutError:
                pass
        self._stop("the multiplexer was closed")

    def _on_event(self, line: bytes) -> None:
        for session in tuple(self._sessions):
            session.event(line)

    def _on_monitor_lost(self, why: str) -> None:
        if not self._end:
            self._stop(why)
            self._on_lost(why)

    def _stop(self, why: str) -> None:
        self._end = self._end or why
        self._schedule.clear()
        self._main.close()
        if self._bulk is not None:
            self._bulk.close()
        for session in tuple(self._sessions):
            session.end()
        self._settled.set()

    # The descriptors of ended sessions.

    def _on_left(self, session: Session) -> None:
        """Close the descriptors of an ended session in QEMU, which has answered all of the session's commands."""
        self._sessions.pop(session, None)
        if self._end:
            return
        for name in self._descriptors.names(session):
            self._execute(descriptors.closefd(name), partial(self._on_name_closed, name))
        members = self._descriptors.take_members(session)
        if members:
            self._execute(descriptors.QUERY_USERS, lambda reply: self._remove(members, reply))

    def _on_name_closed(self, name: str, _: Reply) -> None:
        self._descriptors.release(name)

    def _remove(self, members: list[tuple[int, int]], nodes: Reply) -> None:
        for body in descriptors.remove_unused(members, nodes.line):
            self._execute(body, lambda reply: None)

    def _execute(self, body: bytes, then: Callable[[Reply], None]) -> None:
        """Run a command of the multiplexer itself."""
        self._own += 1
        self._settled.clear()

        def on_reply(_: Call, reply: Reply) -> None:
            then(reply)
            self._own -= 1
            if not self._own:
                self._settled.set()

        self._schedule.submit(Call(Command(body), on_reply))

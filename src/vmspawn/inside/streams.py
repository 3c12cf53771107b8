# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keeps sets of ports for commands, and changes them at a pace that the guest can follow.

QEMU's queue for messages about ports has 32 entries, and QEMU drops messages when the queue is full (docs/agent.md). So
nothing here depends on a message:

1. A new set is plugged in. The agent is asked until the guest knows all ports of the set. If that takes too long, the
   set is unplugged, and another set is plugged in.
2. An idle set is connected in advance, so starting a command needs no QMP command.
3. When a command is over, QEMU closes its ends. When the guest has closed its ends, too, the agent reports it, and the
   set serves the next command. Without the report the set is unplugged. A set is connected again only after the guest
   has noticed that it was disconnected.
4. When the guest is reset, all sets are unplugged. New sets are plugged in when the agent answers again.

Two sets change at a time: a new port takes three messages, all other changes of a port take one.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections import deque
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass, field

from .. import log
from ..agent import protocol
from ..aio.tasks import Tasks
from ..aio.waiting import first_of
from ..errors import NotConnected, NotSupported, QmpError, Timeout, VmspawnError
from .agent import Agent
from .ports import AttachedPort, Ports, Stream

#: Idle sets that are kept for later commands.
KEPT = 3

#: Sets that change at a time.
_CHANGES_MAX = 2

#: Seconds within which a guest whose agent answers must notice a change. A guest that boots may need most of it.
_GUEST_TIMEOUT = 10.0

#: Seconds within which an agent must answer while a manager settles the ports of another manager. A copy on a busy host
#: without KVM may need more than ten, because QEMU translates all of the guest's code again.
_SETTLE_TIMEOUT = 15.0

#: Seconds within which the guest must close its ends. The time is short, because other sets wait for their turn.
_RELEASE_TIMEOUT = 1.0

#: The number of attempts to plug in a set that no command waits for.
_ATTEMPTS = 3


@dataclass(slots=True, eq=False)
class PortSet:
    """A set of ports by the names of their streams. One command at a time uses the set."""

    id: str
    ports: dict[str, AttachedPort] = field(default_factory=dict)
    #: The streams that are connected to the ports.
    streams: dict[str, Stream] = field(default_factory=dict)
    #: Set when the guest has closed its ends.
    released: asyncio.Event = field(default_factory=asyncio.Event)
    #: True if the set must not serve another command.
    is_spent: bool = False
    #: The task that unplugs the set, once it has begun.
    removal: asyncio.Task[None] | None = None

    def close(self) -> None:
        """Close the streams. May be called again."""
        for stream in self.streams.values():
            stream.close()


class Streams:
    """The sets of one machine."""

    def __init__(self, ports: Ports, agent: Agent, tasks: Tasks, most: int) -> None:
        """Begin without ports. `tasks` run work that outlives its caller. The controller has room for `most` sets."""
        self._ports = ports
        self._agent = agent
        self._tasks = tasks
        self._room = most
        self._pace = asyncio.Semaphore(_CHANGES_MAX)
        self._idle: list[PortSet] = []
        #: Sets of commands that run, and of commands that have just ended.
        self._used: set[PortSet] = set()
        self._waiting: deque[asyncio.Future[PortSet]] = deque()
        self._plugging = 0
        self._is_closed = False
        self._prefix = os.urandom(3).hex()
        self._numbers = itertools.count()

    async def take(self) -> PortSet:
        """Return a set that is connected. Raises Timeout, NotConnected, QmpError."""
        if self._idle:
            taken = self._idle.pop(0)
        else:
            waiting: asyncio.Future[PortSet] = asyncio.get_running_loop().create_future()
            self._waiting.append(waiting)
            self._plug_for_waiting()
            try:
                taken = await waiting
            except asyncio.CancelledError:
                self._stop_waiting(waiting)
                raise
        self._ports.set_idle(taken.ports.values(), False)
        taken.released.clear()
        self._used.add(taken)
        return taken

    def _stop_waiting(self, waiting: asyncio.Future[PortSet]) -> None:
        """Forget a caller of `take` that was cancelled, and keep the set that it was given just before."""
        if waiting in self._waiting:
            self._waiting.remove(waiting)
        elif not waiting.cancelled() and waiting.exception() is None:
            self._offer(waiting.result())

    async def plug_ahead(self) -> None:
        """Plug in a set for a later command. Raises Timeout, NotConnected, QmpError."""
        plugged = await self.take()
        self._used.discard(plugged)
        self._offer(plugged)

    def _next_waiting(self) -> asyncio.Future[PortSet] | None:
        while self._waiting:
            if not (waiting := self._waiting.popleft()).done():
                return waiting
        return None

    def _offer(self, connected: PortSet) -> None:
        """Give a set to the first waiting caller, keep it for later, or unplug it."""
        if self._is_closed:
            connected.close()
        elif (waiting := self._next_waiting()) is not None:
            waiting.set_result(connected)
        elif len(self._idle) < KEPT:
            self._ports.set_idle(connected.ports.values(), True)
            self._idle.append(connected)
        else:
            connected.close()
            self._remove(connected)

    # Plugging in.

    def replenish(self) -> None:
        """Plug in a set in advance, unless one is idle or is being plugged in, or several are in use."""
        if not self._idle and not self._plugging and self._room and len(self._used) <= 1:
            self._begin_plugging()

    def _plug_for_waiting(self) -> None:
        while self._room and self._plugging < len(self._waiting):
            self._begin_plugging()

    def _begin_plugging(self) -> None:
        self._room -= 1
        self._plugging += 1
        self._tasks.start(self._plug()).add_done_callback(self._on_plugged)

    def _on_plugged(self, task: asyncio.Task[PortSet]) -> None:
        self._plugging -= 1
        error = NotConnected("the machine ended") if task.cancelled() else task.exception()
        if error is None:
            self._offer(task.result())
            return
        self._room += 1
        if (waiting := self._next_waiting()) is not None:
            waiting.set_exception(error)

    async def _plug(self) -> PortSet:
        """Plug in a set that the guest knows, and connect it."""
        attempts = 0
        while attempts < _ATTEMPTS or self._waiting:
            await self._agent.answers()
            plugged = PortSet(f"{self._prefix}-{next(self._numbers)}")
            if await self._try_to_plug(plugged):
                return plugged
            log.debug(f"the guest does not know all ports of {plugged.id}")
            attempts += 1
            await self._unplug(plugged)
        raise Timeout("the guest did not notice the ports of the command", hint="see the log of the guest's kernel")

    async def _try_to_plug(self, plugged: PortSet) -> bool:
        try:
            async with self._pace:
                await self._attach(plugged)
                is_known = await self._agent.knows_ports(plugged.id, len(protocol.PORTS), _GUEST_TIMEOUT)
                return is_known and await self._connect(plugged)
        except BaseException:
            # `_on_plugged` adds 1 to the room at once, but the ports exist until `_on_removed` adds 1 as well.
            self._room -= 1
            self._remove(plugged)
            raise

    async def _attach(self, plugged: PortSet) -> None:
        """Attach all ports of a set. If one fails, the set has the ports that were attached."""

        async def attach(stream: str) -> None:
            plugged.ports[stream] = await self._ports.attach(protocol.port_name(plugged.id, stream))

        results = await asyncio.gather(*map(attach, protocol.PORTS), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _connect(self, plugged: PortSet) -> bool:
        """Connect a set. Returns False if the guest does not notice. Without success, no stream is open."""
        streams = await self._ports.connect(list(plugged.ports.values()))
        plugged.streams = dict(zip(plugged.ports, streams, strict=True))
        is_connected = False
        try:
            if self._is_closed:
                raise NotConnected("the machine ended")
            is_connected = await self._agent.has_connected(plugged.id, len(protocol.PORTS), _GUEST_TIMEOUT)
        finally:
            if not is_connected:
                plugged.close()
        return is_connected

    async def _reconnect(self, plugged: PortSet) -> bool:
        """Connect a set that was disconnected. Returns False if the guest does not notice.

        Until the guest's kernel has processed QEMU's messages about the disconnection, the guest regards the set as
        connected. A command that began before that would be hung up.
        """
        return await self._agent.has_connected(plugged.id, 0, _GUEST_TIMEOUT) and await self._connect(plugged)

    # After a command.

    def give_back(self, used: PortSet, *, was_run: bool) -> None:
        """Take a set back from a command. `was_run` is True if the command was sent to the agent."""
        used.close()
        self._tasks.start(self._recycle(used, was_run=was_run))

    async def _recycle(self, used: PortSet, *, was_run: bool) -> None:
        is_connected = False
        try:
            async with self._pace:
                is_connected = used.removal is None and await self._try_to_recycle(used, was_run=was_run)
        except (VmspawnError, OSError) as error:
            log.debug(f"the ports of {used.id} cannot be used again: {error}")
        self._used.discard(used)
        if is_connected and used.removal is None:
            self._offer(used)
        else:
            used.close()
            self._remove(used)

    async def _try_to_recycle(self, used: PortSet, *, was_run: bool) -> bool:
        await self._ports.disconnect(list(used.ports.values()))
        if was_run and not (used.is_spent or await self._is_released(used)):
            return False
        if used.is_spent or (len(self._idle) >= KEPT and not self._waiting):
            return False
        return await self._reconnect(used)

    async def _is_released(self, used: PortSet) -> bool:
        """Wait until the guest has closed its ends; returns False if it does not, though its agent answers."""
        await first_of(used.released, timeout=_RELEASE_TIMEOUT)
        if not used.released.is_set():
            await self._agent.answers()
            await first_of(used.released, timeout=_RELEASE_TIMEOUT)
        return used.released.is_set()

    def spend(self) -> None:
        """Exclude the sets in use from later commands: the agent that would report their release was killed."""
        for each in self._used:
            each.is_spent = True

    # Unplugging.

    def _remove(self, plugged: PortSet) -> None:
        """Unplug a set in the background, unless that is under way."""
        if plugged.removal is None:
            plugged.removal = self._tasks.start(self._unplug(plugged))
            plugged.removal.add_done_callback(self._on_removed)

    def _on_removed(self, _: asyncio.Task[None]) -> None:
        self._room += 1
        self._plug_for_waiting()

    async def _unplug(self, plugged: PortSet) -> None:
        await asyncio.gather(*map(self._ports.detach, plugged.ports.values()))
        await self._agent.knows_ports(plugged.id, 0, _GUEST_TIMEOUT)

    def unplug_all(self) -> None:
        """Unplug all sets at once: the guest was reset, and would get too many messages about ports when it boots."""
        idle, self._idle = self._idle, []
        for each in idle:
            each.close()
        # The commands close the streams of the other sets.
        for each in (*idle, *self._used):
            self._remove(each)

    async def clear(self, left: Iterable[AttachedPort], *, is_copy: bool) -> None:
        """Unplug ports that another manager has left, one set after the other. A copy keeps idle sets."""
        sets: dict[str, PortSet] = {}
        for port in left:
            id, stream = protocol.parse_port_name(port.guest_name)
            sets.setdefault(id, PortSet(id)).ports[stream] = port
        is_up = await _within(_SETTLE_TIMEOUT, self._agent.ready())
        for each in sets.values():
            if is_up and is_copy and _is_idle(each) and await self._keep(each):
                continue
            await asyncio.gather(*map(self._ports.detach, each.ports.values()))
            # A guest that does not answer is not asked again.
            is_up = is_up and await _within(_SETTLE_TIMEOUT, self._agent.knows_ports(each.id, 0, _GUEST_TIMEOUT))

    async def _keep(self, idle: PortSet) -> bool:
        """Keep an idle set for the next command. Returns False if the guest does not notice its connection."""
        try:
            if not await _within(_SETTLE_TIMEOUT, self._reconnect(idle)):
                return False
        except QmpError:
            return False
        self._room -= 1
        self._offer(idle)
        return True

    def close(self) -> None:
        """Close the streams of idle sets. Callers of `take` get NotConnected.

        The streams of a set that is being connected are closed when they are connected.
        """
        self._is_closed = True
        for each in self._idle:
            each.close()
        while (waiting := self._next_waiting()) is not None:
            waiting.set_exception(NotConnected("the machine ended"))


def _is_idle(found: PortSet) -> bool:
    """Return whether a set is complete, and no command uses it."""
    return found.ports.keys() == set(protocol.PORTS) and all(port.is_idle for port in found.ports.values())


async def _within(timeout: float, waiting: Awaitable[object]) -> bool:
    """Wait for up to `timeout` seconds. Returns False if the result is False, or the agent does not answer."""
    try:
        async with asyncio.timeout(timeout):
            return await waiting is not False
    except (TimeoutError, NotConnected, NotSupported):
        return False

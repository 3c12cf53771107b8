# SPDX-License-Identifier: LGPL-2.1-or-later
"""Plug in and unplug the ports of commands, at a pace that the guest can follow.

QEMU's queue for news about ports has 32 entries and drops what finds no room; a port that comes takes three, one that
goes takes one (docs/agent.md). So ports come and go a set at a time, and the agent tells when the guest has caught up.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from ..agent.protocol import STATUS, STDERR, STDIN, STDOUT, TTY, port_name
from ..aio.tasks import Tasks
from .agent import Agent
from .ports import AttachedPort, Ports

#: The streams of a command with pipes, and of one with a terminal. The status port goes first when they are unplugged:
#: its end kills the command before that sees the end of its input.
PIPES = (STATUS, STDIN, STDOUT, STDERR)
TERMINAL = (STATUS, TTY)

#: Seconds that a set of ports waits for the guest to notice the one before. A guest that hangs notices nothing.
_PACE_TIMEOUT = 2.0


@dataclass(slots=True, eq=False)
class StreamSet:
    """The ports of one command, and our ends of them by the name of the stream."""

    id: str
    ports: list[AttachedPort]
    sockets: dict[str, socket.socket]

    def close(self) -> None:
        """Close our ends. May be called again."""
        for each in self.sockets.values():
            each.close()


class Streams:
    """Makes and removes sets of ports, and keeps one plugged in ahead: plugging takes longer than a short command."""

    def __init__(self, ports: Ports, agent: Agent, tasks: Tasks) -> None:
        """`tasks` run what outlives its caller."""
        self._ports = ports
        self._agent = agent
        self._tasks = tasks
        self._pace = asyncio.Lock()
        self._spare: StreamSet | None = None
        self._replenishing: asyncio.Task[None] | None = None
        self._prefix = os.urandom(3).hex()
        self._numbers = itertools.count()

    async def take(self, streams: Sequence[str]) -> StreamSet:
        """Return a set of ports that is plugged in. Raises what `Ports.attach` raises."""
        if streams == PIPES and (spare := await self._take_spare()) is not None:
            return spare
        task = self._tasks.start(self._plug(streams))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._abandoned)
            raise

    async def _take_spare(self) -> StreamSet | None:
        """The set that is plugged in ahead, or about to be."""
        if self._spare is None and self._replenishing is not None:
            await asyncio.wait({self._replenishing})
        spare, self._spare = self._spare, None
        return spare

    def _abandoned(self, task: asyncio.Task[StreamSet]) -> None:
        """Nobody waits for these ports any more."""
        if not task.cancelled() and task.exception() is None:
            self.give_back(task.result())

    def replenish(self) -> None:
        """Plug in the spare set, unless it is there."""
        if self._spare is None and self._replenishing is None:
            self._replenishing = self._tasks.start(self._replenish())

    async def _replenish(self) -> None:
        try:
            self._spare = await self._plug(PIPES)
        finally:
            self._replenishing = None

    async def _plug(self, streams: Sequence[str]) -> StreamSet:
        plugged = StreamSet(f"{self._prefix}-{next(self._numbers)}", [], {})
        ports: dict[str, AttachedPort] = {}

        async def attach(stream: str) -> None:
            ports[stream], plugged.sockets[stream] = await self._ports.attach(port_name(plugged.id, stream))

        try:
            async with self._pace:
                results = await asyncio.gather(*map(attach, streams), return_exceptions=True)
                await self._agent.knows_ports(plugged.id, len(streams), _PACE_TIMEOUT)
        except BaseException:
            # The machine has ended meanwhile.
            plugged.close()
            raise
        plugged.ports += [ports[stream] for stream in streams if stream in ports]
        failures = [each for each in results if isinstance(each, BaseException)]
        if failures:
            self.give_back(plugged)
            raise failures[0]
        return plugged

    def give_back(self, plugged: StreamSet) -> None:
        """Unplug a set of ports in the background, which kills the command that uses them."""
        plugged.close()
        self._tasks.start(self._unplug(plugged))

    async def _unplug(self, plugged: StreamSet) -> None:
        async with self._pace:
            await asyncio.gather(*map(self._ports.detach, plugged.ports))
            await self._agent.knows_ports(plugged.id, 0, _PACE_TIMEOUT)

    def unplug_at_once(self, others: Sequence[StreamSet]) -> None:
        """Unplug the spare set and others without waiting for the guest, which was reset.

        A guest that boots hears of all ports at once, and misses some if there are many.
        """
        spare, self._spare = self._spare, None
        for plugged in (*others, *([spare] if spare is not None else ())):
            for port in plugged.ports:
                self._tasks.start(self._ports.detach(port))
        if spare is not None:
            spare.close()

    def close(self) -> None:
        """Close our ends of the spare set."""
        if self._spare is not None:
            self._spare.close()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Gives access to the guest of one machine.

The modules that run commands are imported at their first use, because many machines never run a command.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import TYPE_CHECKING, Any

from ..boot.console import AGENT_PORT_ID
from ..errors import NotSupported, StartError, VmspawnError
from ..machine.running import Running

if TYPE_CHECKING:
    from .commands import Commands

#: Seconds within which the agent of a copy must set the guest's clock. The agent runs already, but the host may be busy
#: with twenty copies.
_WAKE_TIMEOUT = 5.0

#: The section of the journal with the ports of commands.
_PORTS = "ports"


@contextlib.asynccontextmanager
async def _task(work: Coroutine[Any, Any, bool]) -> AsyncIterator[asyncio.Task[bool]]:
    """Run a task during the block, and cancel the task at the block's end."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})


class Inside:
    """The guest of one machine."""

    def __init__(self, machine: Running) -> None:
        self._machine = machine
        self._commands: Commands | None = None
        #: False for a copy whose clock no agent has set.
        self.is_clock_set = True

    @property
    def commands(self) -> Commands:
        """The commands in the guest. Raises NotSupported if the machine has no port for the agent."""
        if self._commands is None:
            from .commands import Commands

            self._commands = Commands(self._machine)
        return self._commands

    async def settle(self) -> None:
        """End the commands of a manager that died.

        In a copy that was just started, also set the clock and the random seed of the guest, and give the guest a new
        identity if the user has requested one. Raises Timeout, NotConnected or StartError.
        """
        incoming = self._machine.incoming
        if self._machine.is_running:
            await self._settle()
        elif incoming is not None or self._has_ports:
            self.is_clock_set = incoming is None
            self._machine.hotplug.tasks.start(self._settle_later())
        if incoming is not None and incoming.new_identity:
            await self._renew_identity()

    async def _settle(self) -> None:
        if self._machine.incoming is None:
            await self._settle_commands(is_copy=False)
            return
        # Both steps wait for the guest, so they run at the same time.
        async with _task(self._wake_copy()) as waking:
            await self._settle_commands(is_copy=True)
            self.is_clock_set = await waking

    async def _settle_later(self) -> None:
        """Settle when the guest runs.

        QEMU crashes if a port is unplugged after it has loaded a state, but before the guest runs (docs/qemu.md,
        "Faults").
        """
        with self._machine.monitor.events() as events:
            async for _ in events:
                if self._machine.is_running:
                    break
        with contextlib.suppress(VmspawnError):
            await self._settle()

    @property
    def _has_ports(self) -> bool:
        return bool(self._machine.attachments.get(_PORTS, {}).get("attachments"))

    async def _settle_commands(self, *, is_copy: bool) -> None:
        if self._has_ports:
            await self.commands.settle(is_copy=is_copy)

    async def _wake_copy(self) -> bool:
        """Let the agent set the clock and the random seed of a copy. Returns False if the agent cannot."""
        if not await self._has_agent():
            return False
        try:
            async with asyncio.timeout(_WAKE_TIMEOUT):
                await self.commands.agent.wake_copy()
        except (TimeoutError, NotSupported):
            return False
        return True

    async def _renew_identity(self) -> None:
        if not self.is_clock_set:
            raise StartError(
                f"cannot give the copy {self._machine.name} an identity of its own: no agent answers in the guest",
                hint="leave out the identity, or see: vmctl help agent",
            )
        from .identity import renew

        await renew(self.commands, self._machine.name)

    async def _has_agent(self) -> bool:
        """Return whether the guest runs, and its agent has opened the port."""
        if not self._machine.is_running:
            return False
        found = await self._machine.monitor.execute("query-chardev")
        return any(each["label"] == AGENT_PORT_ID and each["frontend-open"] for each in found)

    def close(self) -> None:
        """End all commands, and close the connection to the agent. May be called again."""
        if self._commands is not None:
            self._commands.close()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pauses, resumes, resets and powers off a machine in any run state."""

from __future__ import annotations

import asyncio

from ..errors import QmpError, Timeout
from ..qmp.events import first_event
from ..qmp.monitor import Monitor
from ..qmp.run_state import RunState
from . import run_states
from .run_states import Rule, Verb

#: Seconds within which QEMU must reset the machine after its reply to the command.
_RESET_TIMEOUT = 10.0

#: QEMU records the guest's sleep in byte 0x0f of the RTC's memory, and a reset does not clear it: firmware would
#: wake the guest instead of booting (docs/qemu.md, "Run states"). These writes clear the byte.
_FORGET_SLEEP = ("o/b 0x70 0x0f", "o/b 0x71 0")


class Power:
    """The verbs of one machine, as the table in `run_states` defines them."""

    def __init__(self, monitor: Monitor, run_state: RunState) -> None:
        self._monitor = monitor
        self._run_state = run_state

    async def pause(self) -> None:
        """Stop the guest's processors. Raises NotSupported if QEMU cannot pause a suspended guest."""
        rule = await self._rule("pause")
        await self._monitor.execute(rule.command)
        if rule.changes_state and await self._run_state.ask() == "suspended":
            raise run_states.refusal("pause", "suspended")

    async def resume(self) -> None:
        """Let the guest's processors run. Raises NotSupported in states in which QEMU cannot resume them."""
        rule = await self._rule("resume")
        if rule.command == "system_wakeup":
            await self._wake()
            return
        await self._monitor.execute(rule.command)
        # A guest that was paused while suspended is still suspended.
        if await self._run_state.ask() == "suspended":
            await self._wake()

    async def power_off(self) -> None:
        """Press the power button, after waking a guest that is suspended.

        Raises NotSupported if the guest cannot notice the button.
        """
        rule = await self._rule("poweroff")
        if rule.wakes:
            await self._wake()
        await self._monitor.execute(rule.command)

    async def reboot(self) -> None:
        """Reset the machine. A guest that stopped by itself runs afterwards; a paused guest stays paused.

        Raises NotSupported in states in which QEMU cannot reset the machine.
        """
        rule = await self._rule("reboot")
        if not rule.runs_after_reset:
            await self._monitor.execute(rule.command)
            return
        if rule.wakes:
            await self._forget_sleep()
        await self._reset()
        if await self._run_state.ask() == "prelaunch":
            await self._monitor.execute("cont")

    async def _rule(self, verb: Verb) -> Rule:
        status = await self._run_state.ask()
        rule = run_states.rule(verb, status)
        if rule.is_refused:
            raise run_states.refusal(verb, status)
        return rule

    async def _forget_sleep(self) -> None:
        for line in _FORGET_SLEEP:
            await self._monitor.execute("human-monitor-command", {"command-line": line})

    async def _reset(self) -> None:
        with self._monitor.events() as events:
            await self._monitor.execute("system_reset")
            try:
                async with asyncio.timeout(_RESET_TIMEOUT):
                    await first_event(events, "RESET", "SHUTDOWN")
            except TimeoutError:
                raise Timeout(f"QEMU did not reset the machine within {_RESET_TIMEOUT:g} s") from None

    async def _wake(self) -> None:
        try:
            await self._monitor.execute("system_wakeup")
        except QmpError:
            # The guest may have woken up by itself.
            if await self._run_state.ask() == "suspended":
                raise

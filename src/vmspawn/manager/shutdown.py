# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ends a machine on request: asks the guest to power off, then quits QEMU."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from ..aio.waiting import first_of
from ..errors import NotConnected, NotSupported, QmpError, Timeout
from ..host.notify import Notifier
from ..machine import run_states
from ..machine.running import Running
from ..timeouts import POWER_BUTTON_INTERVAL

#: Seconds by which each press of the button extends the service manager's timeout: longer than the interval between
#: two presses plus the time that QEMU takes to end.
_EXTENSION = 20.0

#: Seconds within which a guest must power off if its kernel printed a panic, or if it resets in a loop.
FAILED_GUEST_TIMEOUT = 10.0


async def wake(machine: Running) -> str:
    """Resume a paused guest or wake a suspended one, so that it can react. Returns a description of the action.

    Raises what `Monitor.execute` raises.
    """
    was = machine.status
    if was in ("paused", "io-error", "watchdog"):
        await machine.power.resume()
        return f"it was {was} and has been resumed"
    if was == "suspended":
        await machine.power.resume()
        return "it was suspended and has been woken up"
    return ""


class Shutdown:
    """Ends one machine on request: presses the power button until the guest is off, or quits QEMU."""

    def __init__(self, machine: Running, notice: Callable[[str], None], notifier: Notifier) -> None:
        self._machine = machine
        self._notice = notice
        self._notifier = notifier
        self._task: asyncio.Task[None] | None = None
        self._insist = asyncio.Event()

    def request(self, who: str) -> None:
        """Ask the guest to power off. Ends the machine at a second call, or after the timeout."""
        if self._task is None:
            self._task = asyncio.create_task(self._shut_down(who))
        else:
            self._insist.set()

    def force(self, who: str) -> None:
        """End the machine without asking the guest."""
        self._insist.set()
        if self._task is None:
            self._notice(f"{who}: ending the machine")
            self._task = asyncio.create_task(self._terminate())

    def close(self) -> None:
        """Cancel pending work after the machine's end."""
        if self._task is not None:
            self._task.cancel()

    async def _shut_down(self, who: str) -> None:
        seconds = self._machine.config.shutdown_timeout
        await self._machine.ask_status()
        if (rule := run_states.rule("poweroff", self._machine.status)).is_refused:
            self._notice(f"{who}: the guest cannot power off: {rule.remark}; ending the machine")
            await self._terminate()
            return
        if failure := self._machine.guest_failure:
            seconds = min(seconds, FAILED_GUEST_TIMEOUT)
            self._notice(failure)
        self._notice(
            f"{who}: asked the guest to power off; repeat to end the machine now, else it ends after {seconds:g} s"
        )
        self._notifier.send(STOPPING=1, STATUS="Waiting for the guest to power off")
        pressing = asyncio.create_task(self._press_again_and_again())
        try:
            await first_of(self._insist, timeout=seconds)
        finally:
            pressing.cancel()
        late = "" if self._insist.is_set() else f"the guest did not power off within {seconds:g} s; "
        self._notice(f"{late}ending the machine")
        await self._terminate()

    async def _press_again_and_again(self) -> None:
        while True:
            self._notifier.send(EXTEND_TIMEOUT_USEC=int(_EXTENSION * 1_000_000))
            with contextlib.suppress(Timeout, QmpError, NotConnected, NotSupported):
                if woken := await wake(self._machine):
                    self._notice(f"the guest could not react: {woken}")
                await self._machine.power.power_off()
            await asyncio.sleep(POWER_BUTTON_INTERVAL)

    async def _terminate(self) -> None:
        self._notifier.send(STOPPING=1, STATUS="Ending the machine", EXTEND_TIMEOUT_USEC=int(_EXTENSION * 1_000_000))
        with contextlib.suppress(NotConnected):
            await self._machine.terminate()

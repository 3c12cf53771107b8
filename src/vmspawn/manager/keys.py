# SPDX-License-Identifier: LGPL-2.1-or-later
"""Acts on the console's key sequences, and reports a guest that does not react."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from ..console.hotkeys import Key
from ..errors import NotConnected, NotSupported, QmpError, Timeout
from ..machine.running import Running
from ..qmp.events import first_event
from ..timeouts import REACTION_TIMEOUT
from .shutdown import Shutdown, wake

_CTRL_ALT_DELETE = [{"type": "qcode", "data": key} for key in ("ctrl", "alt", "delete")]


class Keys:
    """Acts on key sequences. `say` shows a line to the user who typed them."""

    def __init__(self, machine: Running, shutdown: Shutdown, say: Callable[[str], None]) -> None:
        self._machine = machine
        self._shutdown = shutdown
        self._say = say
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        # Keys that the guest did not react to. If one is typed again, vmspawn acts without asking the guest.
        self._ignored: set[Key] = set()

    def pressed(self, key: Key) -> None:
        """Act on a key sequence."""
        if key is Key.END:
            self._shutdown.force("^]^]^]")
            return
        if key in self._tasks:
            self._tasks[key].cancel()
        self._tasks[key] = asyncio.create_task(self._obey(key))

    def close(self) -> None:
        """Cancel pending work after the machine's end."""
        for task in self._tasks.values():
            task.cancel()

    async def _obey(self, key: Key) -> None:
        forced = key in self._ignored
        self._ignored.discard(key)
        try:
            if key is Key.POWER_OFF and forced:
                self._shutdown.force("^]^]p")
            elif key is Key.POWER_OFF:
                await self._ask(key, self._machine.power.power_off, "power off", "ends the machine")
            elif forced:
                self._say("resetting the machine")
                await self._machine.power.reboot()
            else:
                await self._ask(key, self._ctrl_alt_delete, "reboot", "resets the machine")
        except (QmpError, Timeout, NotSupported) as error:
            self._say(str(error))
        except NotConnected:
            pass

    async def _ctrl_alt_delete(self) -> None:
        await self._machine.monitor.execute("send-key", {"keys": _CTRL_ALT_DELETE})

    async def _ask(self, key: Key, act: Callable[[], Awaitable[None]], what: str, force: str) -> None:
        """Ask the guest with `act`, and wait for its reaction: QEMU's reply does not show that the guest reacts."""
        woken = await wake(self._machine)
        self._say(f"asked the guest to {what}" + (f"; {woken}" if woken else ""))
        reaction = None
        with self._machine.events() as events:
            try:
                await act()
            except NotSupported as error:
                self._ignored.add(key)
                self._say(f"{error}; {_again(key)} {force}")
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REACTION_TIMEOUT):
                    reaction = await first_event(events, "RESET", "SHUTDOWN")
        if reaction is not None or self._machine.monitor.closed.is_set():
            return
        self._ignored.add(key)
        self._say(f"the guest has not reacted within {REACTION_TIMEOUT:g} s; {_again(key)} {force}")


def _again(key: Key) -> str:
    return f"typing ^]^]{chr(key.value[-1])} again"

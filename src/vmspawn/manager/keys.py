# SPDX-License-Identifier: LGPL-2.1-or-later
"""Obey the console's keys, and report when the guest does not react."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from ..console.hotkeys import Key
from ..errors import NotConnected, NotSupported, QmpError, Timeout
from ..machine.running import Running
from ..timeouts import REACTION_TIMEOUT
from .shutdown import Shutdown, wake

_CTRL_ALT_DELETE = [{"type": "qcode", "data": key} for key in ("ctrl", "alt", "delete")]


class Keys:
    """Obeys the keys. `say` shows a line to whoever pressed them."""

    def __init__(self, machine: Running, shutdown: Shutdown, say: Callable[[str], None]) -> None:
        self._machine = machine
        self._shutdown = shutdown
        self._say = say
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        # Keys whose guest did not react: pressed once more, they no longer ask.
        self._ignored: set[Key] = set()

    def pressed(self, key: Key) -> None:
        """A key was pressed."""
        if key is Key.END:
            self._shutdown.force("^]^]^]")
            return
        if key in self._tasks:
            self._tasks[key].cancel()
        self._tasks[key] = asyncio.create_task(self._obey(key))

    def close(self) -> None:
        """Give up what is under way: the machine has ended."""
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
        """Do it and wait for what shows that the guest has heard: that QEMU takes a command proves nothing."""
        woken = await wake(self._machine)
        self._say(f"asked the guest to {what}" + (f"; {woken}" if woken else ""))
        with self._machine.events() as events:
            try:
                await act()
            except NotSupported as error:
                self._ignored.add(key)
                self._say(f"{error}; {_again(key)} {force}")
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REACTION_TIMEOUT):
                    async for event in events:
                        if event.name in ("RESET", "SHUTDOWN"):
                            return
        if self._machine.monitor.closed.is_set():
            return
        self._ignored.add(key)
        self._say(f"the guest has not reacted within {REACTION_TIMEOUT:g} s; {_again(key)} {force}")


def _again(key: Key) -> str:
    return f"^]^]{chr(key.value[-1])} again"

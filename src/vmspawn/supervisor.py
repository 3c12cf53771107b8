# SPDX-License-Identifier: LGPL-2.1-or-later
"""One run of a machine: QEMU, the control socket, the console and the signals, until it ends."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

from .console.output import ConsoleOutput
from .control.registration import Registered
from .control.server import ControlServer, build_registry
from .errors import NotConnected, Timeout
from .machine.launch import END_SIGNALS, Launched
from .machine.machine import End, Machine
from .waiting import first_of

#: Seconds after which the power button is pressed again: a guest in its firmware does not notice it.
_POWER_BUTTON_INTERVAL = 5.0

#: Seconds that the last of the console's output has to be written.
_FLUSH_TIMEOUT = 5.0


class Shutdown:
    """What the end signals do: first ask the guest, then end the machine."""

    def __init__(self, machine: Machine, notice: Callable[[str], None]) -> None:
        self._machine = machine
        self._notice = notice
        self._task: asyncio.Task[None] | None = None
        self._insist = asyncio.Event()

    def listen(self) -> None:
        """Take over the end signals, those included that came since they were blocked."""
        loop = asyncio.get_running_loop()
        for number in END_SIGNALS:
            loop.add_signal_handler(number, self._signalled, number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, END_SIGNALS)

    def close(self) -> None:
        """Give up what is under way: the machine has ended."""
        if self._task is not None:
            self._task.cancel()

    def _signalled(self, number: signal.Signals) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._shut_down(signal.Signals(number).name))
        else:
            self._insist.set()

    async def _shut_down(self, name: str) -> None:
        seconds = self._machine.config.shutdown_timeout
        self._notice(f"{name}: asked the guest to power off; again to end it at once, else after {seconds:g} s")
        try:
            async with asyncio.timeout(seconds):
                await self._press_until_insisted()
            self._notice("ending the machine")
        except TimeoutError:
            self._notice(f"the guest did not power off within {seconds:g} s; ending the machine")
        except NotConnected:
            return
        await self._machine.terminate()

    async def _press_until_insisted(self) -> None:
        while not self._insist.is_set():
            try:
                await self._machine.power_off()
                async with asyncio.timeout(_POWER_BUTTON_INTERVAL):
                    await self._insist.wait()
            except (TimeoutError, Timeout):
                pass


async def supervise(launched: Launched, notice: Callable[[str], None], *, output: int) -> End:
    """Run a machine that was just launched to its end, and say how it ended. Owns `launched`.

    `output` is the descriptor for the guest's console. Raises StartError if QEMU does not come up.
    """
    machine = Machine(launched.config)
    machine.open(launched)
    server: ControlServer | None = None
    console: ConsoleOutput | None = None
    registered = Registered(machine, notice)
    shutdown = Shutdown(machine, notice)
    try:
        server = ControlServer(machine.directory, build_registry(machine))
        if source := machine.take_console():
            console = ConsoleOutput(source, output)
        shutdown.listen()
        await machine.started()
        await registered.begin()
        notice(f"machine {machine.name} is running; see: vmctl status {machine.name}")
        end = await machine.wait()
        if console is not None:
            await first_of(console.ended, timeout=_FLUSH_TIMEOUT)
        return end
    finally:
        shutdown.close()
        if server is not None:
            server.close()
        if console is not None:
            console.close()
        await registered.end()
        await machine.close()

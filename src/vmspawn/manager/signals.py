# SPDX-License-Identifier: LGPL-2.1-or-later
"""Handles the manager's signals, as listed in docs/console.md.

The command blocks the termination signals before it launches QEMU. Otherwise a signal could kill the manager while QEMU
continues. `run_unless_ended` and `Signals.listen` install the handlers, and unblock the signals.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from typing import Any

from ..boot.started import Started
from ..host.spawn import END_SIGNALS
from ..machine.running import Running
from .front import Front
from .shutdown import Shutdown


async def run_unless_ended(started: Started, start: Coroutine[Any, Any, Running]) -> Running | None:
    """Run the start of a machine. Returns None if a termination signal has ended the machine."""
    came: list[signal.Signals] = []
    task = asyncio.create_task(start)

    def end(number: signal.Signals) -> None:
        came.append(number)
        task.cancel()

    _handle_end_signals(end)
    await asyncio.wait({task})
    if not came:
        return task.result()
    if not task.cancelled() and task.exception() is None:
        # The signal came just after the machine was up.
        await task.result().end()
    started.end()
    return None


class Signals:
    """The signals of one running machine's manager."""

    def __init__(self, shutdown: Shutdown, front: Front) -> None:
        self._shutdown = shutdown
        self._front = front

    def listen(self) -> None:
        """Handle the signals, including pending ones that came while they were blocked."""
        loop = asyncio.get_running_loop()
        _handle_end_signals(self._end)
        loop.add_signal_handler(signal.SIGTSTP, self._front.suspend)
        loop.add_signal_handler(signal.SIGCONT, self._front.resume)
        loop.add_signal_handler(signal.SIGWINCH, self._front.window_changed)
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)

    def _end(self, number: signal.Signals) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGQUIT:
            self._shutdown.force(name)
        elif number == signal.SIGHUP and self._front.expects_hangup:
            self._front.expects_hangup = False
        else:
            self._front.has_hung_up |= number == signal.SIGHUP
            self._shutdown.request(name)


def _handle_end_signals(handler: Callable[[signal.Signals], object]) -> None:
    """Call `handler` with each termination signal, including those that came while they were blocked."""
    loop = asyncio.get_running_loop()
    for number in END_SIGNALS:
        # A signal that the parent process ignored, as nohup(1) and a shell with `&` do, stays ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, handler, number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, END_SIGNALS)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ends QEMU without asking the guest: sends `quit`, and kills QEMU if it does not exit."""

from __future__ import annotations

import asyncio
import contextlib

from ..errors import NotConnected, Timeout
from ..host.process import Process
from ..qmp.monitor import Monitor

#: Seconds between `quit`, which QEMU obeys in milliseconds, and SIGKILL.
QUIT_TIMEOUT = 5.0


class Quit:
    """Ends one QEMU once, however many callers ask for it."""

    def __init__(self, process: Process, monitor: Monitor) -> None:
        self._process = process
        self._monitor = monitor
        self._killer: asyncio.TimerHandle | None = None
        #: True if QEMU had to be killed.
        self.has_killed = False
        #: True if QEMU was told to quit.
        self.has_asked = False

    async def ask(self) -> None:
        """Tell QEMU to quit; returns when QEMU has accepted. A QEMU that does not exit is killed."""
        self.has_asked = True
        if self._killer is None:
            self._killer = asyncio.get_running_loop().call_later(QUIT_TIMEOUT, self._kill)
        # QEMU may exit before it sends its reply, or may be about to be killed.
        with contextlib.suppress(NotConnected, Timeout):
            await self._monitor.execute("quit", timeout=QUIT_TIMEOUT, urgent=True)

    def _kill(self) -> None:
        if not self._process.ended.is_set():
            self.has_killed = True
            self._process.kill()

    def close(self) -> None:
        """Cancel the kill: QEMU has ended, or another manager ends it."""
        if self._killer is not None:
            self._killer.cancel()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tell a service manager that asks for it (WatchdogSec=) that the event loop runs."""

from __future__ import annotations

import asyncio

from ..host.notify import Notifier


class Heartbeat:
    """Sends WATCHDOG=1 as often as the service manager asks for it."""

    #: How often in the time after which the service manager gives us up.
    _BEATS = 3

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier
        self._next: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Send it now, and again and again."""
        if self._notifier.watchdog:
            self._notifier.send(WATCHDOG=1)
            self._next = asyncio.get_running_loop().call_later(self._notifier.watchdog / self._BEATS, self.begin)

    def end(self) -> None:
        """Stop."""
        if self._next is not None:
            self._next.cancel()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reports to the service manager that the event loop runs, if the unit has WatchdogSec=."""

from __future__ import annotations

import asyncio

from ..host.notify import Notifier


class Heartbeat:
    """Sends WATCHDOG=1 several times in each interval of the watchdog."""

    #: The number of messages in each interval of the watchdog.
    _BEATS = 3

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier
        self._next: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Start to send messages, the first one now."""
        if self._notifier.watchdog:
            self._notifier.send(WATCHDOG=1)
            self._next = asyncio.get_running_loop().call_later(self._notifier.watchdog / self._BEATS, self.begin)

    def end(self) -> None:
        """Stop sending messages."""
        if self._next is not None:
            self._next.cancel()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The machine's run state, followed through events so that nobody has to ask QEMU for it."""

from __future__ import annotations

import asyncio
from typing import Any

from .events import Event
from .monitor import Monitor

# What an event says of the state that the next STOP enters (QEMU's qapi/run-state.json, RunState).
_REASONS = {
    "BLOCK_IO_ERROR": ("action", "stop", "io-error"),
    "GUEST_PANICKED": ("action", "pause", "guest-panicked"),
    "WATCHDOG": ("action", "pause", "watchdog"),
}
_STATES = {"RESUME": "running", "WAKEUP": "running", "SUSPEND": "suspended", "SHUTDOWN": "shutdown"}


class RunState:
    """QEMU's RunState and what follows from it. Fed by the manager's monitor."""

    def __init__(self, monitor: Monitor) -> None:
        #: The state in QEMU's words, such as `running`, `paused`, `prelaunch`.
        self.status = "prelaunch"
        #: Why QEMU ended or is about to: its ShutdownCause, such as `guest-shutdown`; empty before that.
        self.shutdown_reason = ""
        #: Set once the guest's processors have run for the first time.
        self.has_run = asyncio.Event()
        self._stop_reason = ""
        self._monitor = monitor
        monitor.listen(self._event)

    @property
    def running(self) -> bool:
        """Whether the guest's processors run."""
        return self.status == "running"

    async def start(self) -> None:
        """Ask once where things stand; from then on the events tell. Raises what `Monitor.execute` raises."""
        answer: dict[str, Any] = await self._monitor.execute("query-status")
        self._enter(answer["status"])

    def _enter(self, status: str) -> None:
        self.status = status
        if status not in ("prelaunch", "inmigrate", "preconfig"):
            self.has_run.set()

    def _event(self, event: Event) -> None:
        data = event.data or {}
        if event.name in _REASONS:
            member, value, reason = _REASONS[event.name]
            self._stop_reason = reason if data.get(member) == value else ""
        elif event.name == "STOP":
            # With -no-shutdown, STOP follows SHUTDOWN and the state stays.
            if self.status != "shutdown":
                self._enter(self._stop_reason or "paused")
            self._stop_reason = ""
        elif event.name in _STATES:
            if event.name == "SHUTDOWN":
                self.shutdown_reason = str(data.get("reason", ""))
            self._enter(_STATES[event.name])

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Follows QEMU's run state by its events, so that most readers need no query."""

from __future__ import annotations

import asyncio
from typing import Any

from .events import Event
from .monitor import COMMAND_TIMEOUT, Monitor

# For each event: a member of its data, the member's value, and the state that the next STOP enters if the member has
# this value (QEMU's qapi/run-state.json, RunState).
_REASONS = {
    "BLOCK_IO_ERROR": ("action", "stop", "io-error"),
    "GUEST_PANICKED": ("action", "pause", "guest-panicked"),
    "WATCHDOG": ("action", "pause", "watchdog"),
}

#: The states that a reset keeps. From any other, the machine enters `prelaunch` and waits to be started.
_KEPT_BY_RESET = ("running", "inmigrate", "finish-migrate")


class RunState:
    """QEMU's RunState. A new object queries the state once, and follows the monitor's events from then on."""

    def __init__(self, monitor: Monitor) -> None:
        #: The state as QEMU names it, for example `running`, `paused` or `prelaunch`.
        self.status = "prelaunch"
        #: QEMU's ShutdownCause, for example `guest-shutdown`, after the shutdown has begun; empty before.
        self.shutdown_reason = ""
        #: Set when the guest's processors have run for the first time.
        self.has_run = asyncio.Event()
        self._stop_reason = ""
        self._monitor = monitor
        monitor.listen(self._on_event)
        self._asked = asyncio.create_task(self._ask_first())
        # `known` raises the task's error; without a caller, asyncio would log it.
        self._asked.add_done_callback(lambda task: task.cancelled() or task.exception())

    @property
    def is_running(self) -> bool:
        """True if the guest's processors run."""
        return self.status == "running"

    async def known(self) -> None:
        """Wait for QEMU's reply to the first query. Raises what `Monitor.execute` raises."""
        await asyncio.shield(self._asked)

    async def ask(self, *, timeout: float = COMMAND_TIMEOUT) -> str:
        """Query QEMU's state, because some changes have no event, for example the end of a migration.

        Raises what `Monitor.execute` raises.
        """
        answer: dict[str, Any] = await self._monitor.execute("query-status", timeout=timeout)
        self._enter(answer["status"])
        return self.status

    async def _ask_first(self) -> None:
        await self._monitor.greeting()
        await self.ask()

    def _enter(self, status: str) -> None:
        self.status = status
        if status not in ("prelaunch", "inmigrate", "preconfig"):
            self.has_run.set()

    def _on_event(self, event: Event) -> None:
        data = event.data or {}
        match event.name:
            case name if name in _REASONS:
                member, value, reason = _REASONS[name]
                self._stop_reason = reason if data.get(member) == value else ""
            case "STOP":
                self._on_stop()
            case "RESET" if self.status not in _KEPT_BY_RESET:
                self._enter("prelaunch")
            case "MIGRATION" if data.get("status") == "completed" and self.status == "inmigrate":
                self._enter("paused")
            case "SHUTDOWN":
                self.shutdown_reason = str(data.get("reason", ""))
                self._enter("shutdown")
            case "RESUME" | "WAKEUP":
                self._enter("running")
            case "SUSPEND":
                self._enter("suspended")

    def _on_stop(self) -> None:
        # With -no-shutdown, STOP follows SHUTDOWN and the state stays.
        if self.status != "shutdown":
            self._enter(self._stop_reason or "paused")
        self._stop_reason = ""

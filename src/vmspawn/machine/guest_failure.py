# SPDX-License-Identifier: LGPL-2.1-or-later
"""Detects a guest that fails: its kernel panics, it resets in a loop, or its image does not boot.

QEMU ends a machine whose guest reports a panic through pvpanic. A kernel without a driver for pvpanic prints its panic
and stops or reboots, and QEMU does not notice. A program in the guest can print the same text, so a printed panic does
not end the machine: it is reported, shortens the shutdown, and makes the exit status 1.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ..aio.tasks import Tasks
from ..console.hub import Console
from ..console.panic import OutputWatch
from ..qmp.events import Event
from ..qmp.monitor import Monitor
from .bios_image import why_not_bootable

#: Seconds after which a printed panic is reported. If pvpanic ends the machine before, no report is needed.
_REPORT_DELAY = 1.0

#: The number of consecutive resets by the guest that count as a loop, and the seconds without a reset that end the
#: sequence.
RESETS = 3
LOOP_GAP = 60.0

#: Seconds within which two resets count as one: a guest may try two ways to reboot (docs/qemu.md, "Events").
_SAME_RESET = 0.2

#: Seconds without output after which an image that BIOS boots is inspected.
SILENCE = 10.0

_PANICKED = "the guest's kernel panicked"


class GuestFailure:
    """The failures of one machine's guest. `report` is called with a line for each new failure."""

    def __init__(self, monitor: Monitor, report: Callable[[str], None]) -> None:
        self._report = report
        self._loop = asyncio.get_running_loop()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._tasks = Tasks()
        self._resets = 0
        self._last_reset = 0.0
        self._panic: str | None = None
        #: Set after the first failure.
        self.seen = asyncio.Event()
        monitor.listen(self._on_event)

    @property
    def panic(self) -> str:
        """The last panic of the guest's kernel, or an empty string if there was none, or the guest has recovered."""
        if self._panic is None:
            return ""
        return f"{_PANICKED}: {self._panic}" if self._panic else _PANICKED

    @property
    def reason(self) -> str:
        """The reason why the guest has failed, or an empty string."""
        if self._resets >= RESETS:
            cause = f"; {self.panic}" if self._panic is not None else ""
            return f"the guest has reset itself {self._resets} times in a row and may never come up{cause}"
        return self.panic

    def watch_console(self, console: Console) -> OutputWatch:
        """Look for panics in the console's output."""
        watch = OutputWatch(self._on_panic)
        console.attach(watch)
        return watch

    def watch_image(self, output: OutputWatch, image: str, image_format: str) -> None:
        """Report why BIOS does not boot an image, if the guest prints nothing for a while."""

        async def look() -> None:
            why = await asyncio.to_thread(why_not_bootable, image, image_format)
            if why and not output.has_output:
                self._report(f"the guest has printed nothing for {SILENCE:g} s: {why}")

        def silent() -> None:
            if not output.has_output:
                self._tasks.start(look())

        self._call_later("silence", SILENCE, silent)

    def close(self) -> None:
        """Stop watching. May be called again."""
        for timer in self._timers.values():
            timer.cancel()
        self._tasks.cancel()

    def _on_panic(self, message: str) -> None:
        is_new = self._panic is None
        self._panic = message
        self.seen.set()
        if is_new and self._resets < RESETS:
            self._call_later("report", _REPORT_DELAY, lambda: self._report(self.panic))

    def _on_event(self, event: Event) -> None:
        data = event.data or {}
        if event.name in ("GUEST_PANICKED", "GUEST_CRASHLOADED"):
            self._on_panic(self._panic or "")
        elif event.name == "RESET" and data.get("guest"):
            self._on_guest_reset()
        elif event.name == "RESET" or (event.name == "VSERPORT_CHANGE" and data.get("open")):
            # The machine was reset from outside, or a program in the guest has opened a port, so the guest works.
            self._recovered()

    def _on_guest_reset(self) -> None:
        before, self._last_reset = self._last_reset, self._loop.time()
        if self._last_reset - before < _SAME_RESET:
            return
        self._resets += 1
        self._call_later("recovery", LOOP_GAP, self._recovered)
        if self._resets == RESETS:
            self.seen.set()
            self._report(self.reason)

    def _recovered(self) -> None:
        self._resets = 0
        self._panic = None

    def _call_later(self, what: str, seconds: float, callback: Callable[[], None]) -> None:
        if what in self._timers:
            self._timers[what].cancel()
        self._timers[what] = self._loop.call_later(seconds, callback)

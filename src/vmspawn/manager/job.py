# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run one command in the guest, and end the machine with it: what `--run=` asks for.

The command has our standard streams. A process of its own moves their bytes, as `vmctl exec` does.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Sequence

from ..aio.waiting import first_of
from ..machine.ending import End
from ..machine.running import Running

#: The exit status of a command whose end is not known.
EXIT_FAILURE = 125

#: What a kernel prints as it panics.
_PANIC = b"Kernel panic - not syncing"

#: Seconds after that: a device of QEMU's may report the panic, and what the kernel prints next is of interest.
_PANIC_TIMEOUT = 2.0

#: Seconds that the process has to end after the machine.
_EXIT_TIMEOUT = 10.0

#: What is kept of the console, and the lines of it that are shown if the machine fails.
_KEPT = 64 * 1024
_LINES = 50


class Tail:
    """Keeps the end of what the guest prints on its console."""

    is_full = False

    def __init__(self) -> None:
        self._kept = b""
        #: Set when the guest's kernel has panicked.
        self.panicked = asyncio.Event()

    def show(self, data: bytes) -> None:
        """Take note of output."""
        self._kept = (self._kept + data)[-_KEPT:]
        if _PANIC in self._kept[-len(data) - len(_PANIC) :]:
            self.panicked.set()

    def finish(self) -> bool:
        """Return True: this viewer buffers no output."""
        return True

    def lines(self) -> list[str]:
        """The last lines."""
        return self._kept.decode(errors="replace").splitlines()[-_LINES:]


class Job:
    """The command of one machine. `status` is the exit status for vmspawn, once `until_done` has returned."""

    def __init__(self, command: Sequence[str]) -> None:
        """`command` are the arguments of a program that runs the command in the guest, on our standard streams."""
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._tail = Tail()
        self.status = EXIT_FAILURE

    def start(self, machine: Running) -> None:
        """Start the process. Raises OSError."""
        machine.console.attach(self._tail)
        self._process = subprocess.Popen([*self._command])

    async def until_done(self, machine: Running, report: Callable[[str], None]) -> None:
        """Wait until the command has ended, and end the machine then; or until the machine has to end."""
        assert self._process is not None
        exited = asyncio.Event()
        pidfd = os.pidfd_open(self._process.pid)
        loop = asyncio.get_running_loop()
        loop.add_reader(pidfd, exited.set)
        try:
            await first_of(exited, self._tail.panicked)
            if exited.is_set():
                self.status = self._process.wait()
            else:
                await first_of(exited, timeout=_PANIC_TIMEOUT)
                report("the guest's kernel panicked")
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
        self._end_process()
        await machine.terminate()

    async def finish(self, end: End) -> None:
        """The machine has ended. Wait for the process, which learns so by itself, and show the console if that is of
        interest."""
        if self._process is not None and self._process.poll() is None:
            try:
                self.status = await asyncio.to_thread(self._process.wait, _EXIT_TIMEOUT)
            except subprocess.TimeoutExpired:
                self._end_process()
        if not end.clean or self._tail.panicked.is_set():
            for line in self._tail.lines():
                print(line.rstrip("\r"), file=sys.stderr)

    def _end_process(self) -> None:
        assert self._process is not None
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait()

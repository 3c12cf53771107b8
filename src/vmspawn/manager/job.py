# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs one command in the guest, and ends the machine after it, for `--run=`.

The command uses vmspawn's standard streams. A separate process, `vmctl exec`, copies their bytes.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Sequence

from ..aio.waiting import first_of
from ..machine.ending import End
from ..machine.running import Running
from ..text import console_lines

#: The exit status of a command whose end is not known.
EXIT_FAILURE = 125

#: Seconds between a failure of the guest and the end of the machine. Meanwhile the kernel prints more, and QEMU may
#: report the failure too.
_FAILURE_TIMEOUT = 2.0

#: Seconds within which the process must end after the end of the machine or after SIGTERM.
_EXIT_TIMEOUT = 10.0

#: The prefix of the built-in guest's messages about features that its kernel lacks.
_LACKS = "vmspawn-guest: the kernel lacks "
#: The message about the ports for commands. After it, the guest does not power off by itself.
_LACKS_PORTS = f"{_LACKS}CONFIG_VIRTIO_CONSOLE".encode()

#: The maximum size of the kept output in bytes, and the maximum number of its last lines that are printed.
_KEPT = 64 * 1024
_LINES = 50


class Tail:
    """Keeps the last output of the guest's console.

    `lacks_ports` is set when the guest reports that its kernel does not support the ports for commands.
    """

    is_full = False

    def __init__(self) -> None:
        self._kept = b""
        self.lacks_ports = asyncio.Event()

    def show(self, data: bytes) -> None:
        """Keep output."""
        self._kept = (self._kept + data)[-_KEPT:]
        if _LACKS_PORTS in self._kept[-len(data) - len(_LACKS_PORTS) :]:
            self.lacks_ports.set()

    def finish(self) -> bool:
        """Return True: this viewer buffers no output."""
        return True

    def lines(self) -> list[str]:
        """Return the last lines, safe to print."""
        return console_lines(self._kept.decode(errors="replace"))[-_LINES:]


class Job:
    """The command of one machine. `status` is the exit status for vmspawn, once `until_done` has returned."""

    def __init__(self, command: Sequence[str]) -> None:
        """Prepare a job. `command` is a program, with arguments, that runs the guest's command on standard streams."""
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._tail = Tail()
        self.status = EXIT_FAILURE

    def start(self, machine: Running) -> None:
        """Start the process. Raises OSError."""
        machine.console.attach(self._tail)
        self._process = subprocess.Popen([*self._command])

    async def until_done(self, machine: Running) -> None:
        """Wait until the command has ended or the guest has failed, then end the machine."""
        assert self._process is not None
        exited = asyncio.Event()
        pidfd = os.pidfd_open(self._process.pid)
        loop = asyncio.get_running_loop()
        loop.add_reader(pidfd, exited.set)
        try:
            await first_of(exited, machine.guest_failed, self._tail.lacks_ports)
            await first_of(exited, timeout=_FAILURE_TIMEOUT)
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
        if exited.is_set():
            self.status = self._process.wait()
        await self._end_process()
        await machine.terminate()

    async def finish(self, end: End) -> None:
        """Wait for the process after the machine's end, and print the console's last lines if the machine failed.

        Lines about features that the guest's kernel lacks are always printed. The process notices the end of the
        machine by itself.
        """
        if self._process is not None and self._process.poll() is None:
            try:
                self.status = await asyncio.to_thread(self._process.wait, _EXIT_TIMEOUT)
            except subprocess.TimeoutExpired:
                await self._end_process()
        for line in self._tail.lines():
            if not end.clean or line.startswith(_LACKS):
                print(line, file=sys.stderr)

    async def _end_process(self) -> None:
        """End the process if it runs, by SIGKILL if SIGTERM does not end it."""
        assert self._process is not None
        if self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            await asyncio.to_thread(self._process.wait, _EXIT_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

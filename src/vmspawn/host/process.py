# SPDX-License-Identifier: LGPL-2.1-or-later
"""Watches a process through its pidfd: a child, or a process that an earlier manager started."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

from .runtime import start_time


class Process:
    """A running process. Owns a pidfd until the process has ended and been reaped."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.started = start_time(pid)
        self._fd = os.pidfd_open(pid)
        #: The exit status as in os.waitstatus_to_exitcode, or None if the process is not a child.
        self.status: int | None = None
        self.ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._fd, self._reap)

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        with contextlib.suppress(ChildProcessError):
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self._fd)
        self._fd = -1
        self.ended.set()

    def close(self) -> None:
        """Stop watching, and leave the process running."""
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def kill(self) -> None:
        """Send SIGKILL to this process, and never to a later process with the same id."""
        if self._fd >= 0:
            signal.pidfd_send_signal(self._fd, signal.SIGKILL)

    def describe_end(self) -> str:
        """Describe the end of the process."""
        if self.status is None:
            return "ended"
        if self.status < 0:
            try:
                return f"died of {signal.Signals(-self.status).name}"
            except ValueError:
                return f"died of signal {-self.status}"
        return f"exited with status {self.status}"

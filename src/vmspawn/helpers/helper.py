# SPDX-License-Identifier: LGPL-2.1-or-later
"""Manages the processes that a machine needs besides QEMU."""

from __future__ import annotations

import contextlib
import os
import signal

_LOG_MAX = 1 << 16


class Helper:
    """A helper process and its log. Owns both. `what` is a predicate: `served /srv to the guest`."""

    __slots__ = ("_log", "name", "pid", "what")

    def __init__(self, name: str, what: str, pid: int, log: int) -> None:
        self.name = name
        self.what = what
        #: The process id, or 0 after the process has ended: the kernel may then reuse the number.
        self.pid = pid
        self._log = log

    def describe(self, end: str) -> str:
        """Describe the end of this helper, with the last line that it printed."""
        size = os.fstat(self._log).st_size
        text = os.pread(self._log, _LOG_MAX, max(0, size - _LOG_MAX)).decode(errors="replace")
        last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
        return f"{self.name}, which {self.what}, {end}" + (f": {last}" if last else "")

    def close(self) -> None:
        """Kill the process if it still runs, and close the log."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)
            self.pid = 0
        self.leave()

    def leave(self) -> None:
        """Close the log and leave the process running. May be called again."""
        if self._log >= 0:
            os.close(self._log)
            self._log = -1

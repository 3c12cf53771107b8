# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starts copies, each under a separate manager in the background.

On vmctl's start path: imports next to nothing.
"""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Sequence

from ..errors import StartError, Timeout

#: The prefix of vmspawn's errors on standard error.
_PREFIX = "vmspawn: "


def start_copies(
    full_name: str,
    names: Sequence[str],
    *,
    keep_disks: bool = False,
    new_identity: bool = False,
    arguments: Sequence[str] = (),
    timeout: float,
) -> list[str]:
    """Start copies of a snapshot at once, and wait until all of them run; those that fail do not end the others.

    `arguments` are further options of vmspawn. Returns the names of the copies whose clock stands as it was saved: no
    agent in the guest has set the clock. Raises StartError, Timeout.
    """
    shared = [f"--fork={full_name}", *arguments]
    shared += ["--keep"] if keep_disks else []
    shared += ["--identity=new"] if new_identity else []
    started = [_Manager(name, [f"--machine={name}", *shared]) for name in names]
    deadline = time.monotonic() + timeout
    failures = [error for each in started if (error := each.wait(deadline)) is not None]
    if failures:
        raise failures[0]
    return [each.name for each in started if not each.is_clock_set]


class _Manager:
    """A starting manager, which outlives this process."""

    def __init__(self, name: str, arguments: list[str]) -> None:
        self.name = name
        self.is_clock_set = False
        #: The manager's standard error.
        self._log = os.memfd_create("vmspawn-manager", os.MFD_CLOEXEC)
        self._waiting, telling = os.pipe()
        command = [sys.executable, "-m", "vmspawn.cli.spawn", *arguments]
        command += ["--console=headless", f"--ready-fd={telling}"]
        actions: list[tuple[object, ...]] = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_DUP2, self._log, 2),
            # Duplicating a descriptor onto itself makes it inheritable in the child alone.
            (os.POSIX_SPAWN_DUP2, telling, telling),
        ]
        try:
            self._pid = os.posix_spawn(sys.executable, command, os.environ, file_actions=actions, setsid=True)
        finally:
            os.close(telling)

    def wait(self, deadline: float) -> StartError | Timeout | None:
        """Wait until the manager has started its machine. Returns the error if the manager fails."""
        try:
            if not select.select([self._waiting], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return Timeout(f"the manager of {self.name} (process {self._pid}) has not started it in time")
            if told := os.read(self._waiting, 1):
                self.is_clock_set = told == b"1"
                return None
            os.waitpid(self._pid, 0)
            return failure(os.pread(self._log, 1 << 16, 0).decode(errors="replace"))
        finally:
            os.close(self._waiting)
            os.close(self._log)


def failure(said: str) -> StartError:
    """Return the error that a manager printed before it gave up."""
    lines = [line for line in said.splitlines() if line.strip()]
    for number, line in enumerate(lines):
        if line.startswith(_PREFIX):
            hint = lines[number + 1].strip() if number + 1 < len(lines) else ""
            return StartError(line.removeprefix(_PREFIX), hint=hint)
    return StartError(lines[-1] if lines else "the manager ended without an error message")

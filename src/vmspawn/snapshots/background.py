# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starts copies of a snapshot's machine in the background, each under its own manager.

This module is on vmctl's start path and imports next to nothing.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence

from ..aio.sockets import is_readable
from ..errors import StartError, Timeout, UsageError
from ..host.runtime import MachineDirectory
from ..images import snapshot_files
from ..images.snapshot_files import MANIFEST
from ..network.forward import Forward
from ..record import Record
from .names import name_in_use

#: The prefix of vmspawn's errors on standard error.
_PREFIX = "vmspawn: "

#: The consoles that need no terminal.
CONSOLES = ("headless", "gui")


class CopyOptions(Record):
    """The options of copies that start in the background. `parent` is a process that they must not outlive, or 0."""

    keep_disks: bool = False
    new_identity: bool = False
    force_version: bool = False
    console: str = CONSOLES[0]
    console_log: str = ""
    forwards: tuple[Forward, ...] = ()
    parent: int = 0

    def check(self, copies: int) -> None:
        """Raise UsageError for an option that does not work for this number of copies in the background."""
        if self.console not in CONSOLES:
            raise UsageError.with_fields(
                "{console={console}} does not work for a copy in the background, which has no terminal",
                hint="use {choices}; or start the copy in the foreground, with: vmspawn --fork=",
                console=self.console,
                choices=" or ".join(CONSOLES),
            )
        if copies < 2:
            return
        if self.console_log:
            raise UsageError.with_fields(
                "{console_log={path}} names one file for {copies} copies",
                hint="start each copy separately",
                path=self.console_log,
                copies=copies,
            )
        for forward in self.forwards:
            if forward.port:
                raise UsageError.with_fields(
                    "{forwards={forward}} names one port of the host for {copies} copies",
                    hint="use port 0 for any free one, or start each copy separately",
                    forward=str(forward),
                    copies=copies,
                )

    def arguments(self) -> Iterator[str]:
        """Yield the arguments of vmspawn for these options."""
        yield f"--console={self.console}"
        if self.keep_disks:
            yield "--keep"
        if self.new_identity:
            yield "--identity=new"
        if self.force_version:
            yield "--force-version"
        if self.console_log:
            yield f"--log={self.console_log}"
        for forward in self.forwards:
            yield f"--forward={forward}"
        if self.parent:
            yield f"--parent-pid={self.parent}"


def check(names: Sequence[str], options: CopyOptions) -> None:
    """Raise UsageError, StartError or SnapshotExists for copies that cannot be started."""
    options.check(len(names))
    for name in names:
        # Checked here, because a manager's own error would advise an option that vmctl fork does not have.
        MachineDirectory.create(name).remove()
        if options.keep_disks and os.path.exists(os.path.join(snapshot_files.current_folder(name), MANIFEST)):
            raise name_in_use(name)


def start_copies(full_name: str, names: Sequence[str], options: CopyOptions, *, timeout: float) -> list[str]:
    """Start copies of a snapshot at once, and wait until all of them run. A copy that fails does not end the others.

    Returns the names of the copies whose clock shows the time of the save, because no agent in the guest has set it.
    Raises UsageError, StartError, SnapshotExists, Timeout. The error's hint names the copies that run.
    """
    check(names, options)
    shared = [f"--fork={full_name}", *options.arguments()]
    started = [_Manager(name, [f"--machine={name}", *shared]) for name in names]
    deadline = time.monotonic() + timeout
    failures = {each.name: error for each in started if (error := each.wait(deadline)) is not None}
    if failures:
        raise _joined(failures, [name for name in names if name not in failures])
    return [each.name for each in started if not each.is_clock_set]


def _joined(failures: dict[str, StartError | Timeout], running: Sequence[str]) -> StartError | Timeout:
    """Return one error for the copies that failed. Its hint names the copies that run."""
    first = next(iter(failures.values()))
    if len(failures) + len(running) == 1:
        return first
    message = "; ".join(f"cannot start {name}: {error}" for name, error in failures.items())
    hint = f"started nevertheless: {', '.join(running)}" if running else ""
    return type(first)(message, hint="; ".join(filter(None, (hint, first.hint))))


class _Manager:
    """A starting manager, which outlives this process."""

    def __init__(self, name: str, arguments: list[str]) -> None:
        self.name = name
        self.is_clock_set = False
        #: The manager's standard error.
        self._log = os.memfd_create("vmspawn-manager", os.MFD_CLOEXEC)
        self._waiting, telling = os.pipe()
        command = [sys.executable, "-m", "vmspawn.cli.spawn", *arguments]
        command.append(f"--ready-fd={telling}")
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
            if not is_readable(self._waiting, within=deadline - time.monotonic()):
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

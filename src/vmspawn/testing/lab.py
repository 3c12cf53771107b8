# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starts machines for tests, adds them to the reports of failed tests, and checks them for leaks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Self

import pytest

from .. import sync
from ..api import machine as api
from ..api.blocking import Blocking, background
from ..api.launching import start_copy
from ..api.options import CopyOptions, check_names, to_config
from ..boot.qemu import find_qemu
from ..errors import CommandFailed, GuestError, StartError, UsageError, VmspawnError
from ..sizes import bytes_of
from ..storage.disk import Disk
from . import leaks, report

#: The output of the built-in guest when its shell is up.
_BUILTIN_READY = "vmspawn-guest: ready"

#: Seconds within which a guest must become ready. The built-in guest takes two on an idle host.
_READY_TIMEOUT = 120.0

#: Seconds within which a manager must adopt a machine that --vm-keep keeps.
_ADOPT_TIMEOUT = 60.0

#: The options that may differ between a copy and its snapshot.
_OPTIONS_OF_COPIES = ("name", *CopyOptions.__annotations__)

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_]+")


class Lab:
    """The machines of one test process."""

    def __init__(self, folder: Path, *, console: int | None, keep: bool, required: bool) -> None:
        """Put images and logs into `folder`. Show consoles on the descriptor `console`, which the caller keeps."""
        self.folder = folder
        self.console = console
        self.keep = keep
        self.required = required
        #: The running machines, and the machines that have ended since the last report.
        self.machines: list[LabMachine] = []

    def machine(self, label: str, options: Mapping[str, Any]) -> LabMachine:
        """Make a machine whose name begins with `label`. Fails the test for invalid options."""
        cleaned = _NOT_IN_NAMES.sub("-", label).strip("-")[:40] or "vm"
        name = f"{cleaned}-{uuid.uuid4().hex[:8]}".lstrip("_-")
        try:
            return LabMachine(self, cleaned, {"name": name, **options})
        except (TypeError, VmspawnError) as error:
            _fail(error)

    def report(self, item: pytest.Item, to: pytest.TestReport) -> None:
        """Add sections about a test's machines to the test's report."""
        used = {id(each) for each in _machines_in(getattr(item, "funcargs", {}).values())}
        for machine in self.machines:
            if machine.test == item.nodeid or id(machine._inner) in used:
                machine.has_failed = True
                to.sections += machine.last_words or report.sections(machine.label, machine, machine.commands)
                if self.keep and (machine.is_up or machine.is_kept):
                    item.user_properties.append(("vm-kept", machine.name))
                    to.user_properties.append(("vm-kept", machine.name))
        self.machines = [each for each in self.machines if each.is_up]


def _machines_in(values: Iterable[object]) -> Iterator[object]:
    """Yield the machines among the values of fixtures, including machines in collections."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _machines_in(value)
        elif isinstance(value, dict):
            yield from _machines_in(value.values())
        else:
            yield getattr(value, "_inner", None)


class RecordedMachine(api.Machine):
    """A machine that remembers the last commands that a test has run in its guest."""

    commands: deque[report.Command]

    @classmethod
    def of(cls, options: dict[str, Any]) -> RecordedMachine:
        """Make a machine. The built-in guest starts from a snapshot of a booted guest if the options allow that."""
        machine = cls._of_options(options)
        machine.commands = deque(maxlen=report.COMMANDS_MAX)
        return machine

    @classmethod
    def _of_options(cls, options: dict[str, Any]) -> RecordedMachine:
        if snapshot := options.pop("snapshot", None):
            return cls._of_snapshot(getattr(snapshot, "name", snapshot), options)
        if options.get("guest") and "warm" not in options:
            with suppress(UsageError):
                return cls(**options, warm=True)
        return cls(**options)

    @classmethod
    def _of_snapshot(cls, snapshot: str, options: dict[str, Any]) -> RecordedMachine:
        check_names("vmspawn_factory", options, _OPTIONS_OF_COPIES)
        config = to_config(None, options)
        machine = cls._of(config, partial(start_copy, config, snapshot, keep_disks=False, new_identity=False))
        assert isinstance(machine, cls)
        return machine

    async def run(self, command: Any, **options: Any) -> Any:
        try:
            done = await super().run(command, **options)
        except CommandFailed as error:
            self.commands.append(report.Command(command, str(error.status), error.stderr))
            raise
        except VmspawnError as error:
            self.commands.append(report.Command(command, "-", str(error)))
            raise
        self.commands.append(report.Command(command, str(done.status), done.stderr))
        return done


class LabMachine(sync.Machine):
    """A machine for tests: a `vmspawn.sync.Machine` that is ready when `with` is entered."""

    def __init__(self, lab: Lab, label: str, options: dict[str, Any]) -> None:
        self._disks: Iterable[Disk | str | os.PathLike[str]] = options.pop("disks", ())
        self._ready: str | None = options.pop("ready", None)
        self._is_copy = bool(options.get("snapshot"))
        if not any(options.get(each) for each in ("guest", "image", "linux", "directory", "snapshot")):
            options["guest"] = "builtin"
        if options.get("guest") and self._ready is None:
            self._ready = _BUILTIN_READY
        options.setdefault("qmp_log", lab.folder / f"{options['name']}.qmp.log")
        # Machines end with the test run, even if it is killed.
        options.setdefault("die_with_program", not lab.keep)
        self._recorded = RecordedMachine.of(options)
        Blocking.__init__(self, self._recorded)
        self._lab = lab
        self.label = label
        #: True if a test that used the machine has failed.
        self.has_failed = False
        self.is_up = self.is_kept = False
        #: The test that started the machine.
        self.test = ""
        self._before: leaks.UnownedObjects | None = None
        #: The machine's sections of the report, made when it ended.
        self.last_words: report.Sections = []

    @property
    def commands(self) -> deque[report.Command]:
        """The last commands that a test has run in its guest."""
        return self._recorded.commands

    def __enter__(self) -> Self:
        self._find_qemu()
        try:
            super().__enter__()
        except GuestError as error:
            self._skip(error)
        except VmspawnError as error:
            _fail(error)
        self.is_up = True
        self.test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
        self._lab.machines.append(self)
        try:
            self._prepare()
        except BaseException as error:
            self.__exit__(type(error))
            if isinstance(error, VmspawnError):
                _fail(error)
            raise
        return self

    def _find_qemu(self) -> None:
        config = self.config
        if self._is_copy:
            # The snapshot names its QEMU.
            return
        try:
            find_qemu(config.qemu, config.machine_type)
        except StartError as error:
            # A missing QEMU skips the test, unless the user named its path.
            if config.qemu:
                _fail(error)
            self._skip(error)
        except VmspawnError as error:
            _fail(error)

    def _skip(self, error: VmspawnError) -> NoReturn:
        if self._lab.required:
            _fail(error)
        raise pytest.skip.Exception(_told(error)) from None

    def _prepare(self) -> None:
        """Wait until the guest is ready, and attach its disks."""
        if self._lab.console is not None and self.config.console != "native":
            viewer = _Viewer(self._lab.console)
            self._read(lambda inner: inner._running.console.attach(viewer))
        if self._ready is not None:
            self.console.expect(self._ready, timeout=_READY_TIMEOUT)
        for number, disk in enumerate(self._disks):
            self._attach(number, disk)
        self._before = self._call(lambda inner: leaks.UnownedObjects.of(inner._running))

    def _attach(self, number: int, disk: Disk | str | os.PathLike[str]) -> None:
        """Attach a disk. If `disk` is a size, such as `64M`, attach a new, empty image of that size."""
        size = bytes_of(disk) if isinstance(disk, str) else None
        if size is None:
            self.attach(disk)
            return
        path = self._lab.folder / f"{self.name}-disk{number}.raw"
        with open(path, "xb") as image:
            image.truncate(size)
        self.attach(path, name=f"disk{number}")

    def __exit__(self, kind: object = None, *_: object) -> None:
        if self._is_inherited:
            return
        self.has_failed |= kind is not None
        if self.has_failed and self._lab.keep:
            self._leave()
        else:
            self._end()

    def _end(self) -> None:
        """End the machine. Fails a test that has passed so far if the machine leaves something behind."""
        before = self._before
        found = self._call(lambda inner: leaks.UnownedObjects.of(inner._running)).since(before) if before else []
        directory, pids = self.directory, [self.pid, *self._inner._running.helper_pids]
        if self.has_failed or found:
            self.last_words = report.sections(self.label, self, self.commands)
        self.is_up = False
        super().__exit__()
        found += leaks.outside(directory, pids)
        if found and not self.has_failed:
            pytest.fail(f"the test left behind: {', '.join(found)}", pytrace=False)
        if not self.has_failed:
            self._lab.machines.remove(self)

    def _leave(self) -> None:
        """Leave the machine running, and start a manager that adopts it."""
        self.last_words = report.sections(self.label, self, self.commands)
        self.is_up, self.is_kept = False, True
        background().open.discard(self)
        self._call(lambda inner: inner._running.leave())
        command = [sys.executable, "-m", "vmspawn.cli.ctl", "adopt", self.name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ADOPT_TIMEOUT, check=False)
        if done.returncode:
            pytest.fail(f"cannot keep machine {self.name}: {done.stderr.strip()}", pytrace=False)


class _Viewer:
    """Shows a console on a descriptor."""

    is_full = False

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def show(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._fd, data) :]

    def finish(self) -> bool:
        return True


def _fail(error: BaseException) -> NoReturn:
    """Fail the test with the error's message, without a traceback."""
    raise pytest.fail.Exception(_told(error), pytrace=False) from None


def _told(error: BaseException) -> str:
    return "\n".join((str(error), *getattr(error, "__notes__", ())))

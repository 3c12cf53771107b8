# SPDX-License-Identifier: LGPL-2.1-or-later
# Made by tools/make_sync.py from vmspawn/api; do not edit.
"""Offers the classes of `vmspawn` with blocking calls, for scripts, tests and the interactive interpreter.

    import vmspawn.sync

    with vmspawn.sync.Machine(guest="builtin", ram="512M") as machine:
        machine.console.expect("ready", timeout=60)

The coroutines run on one event loop in a thread of its own. Any thread may make calls. A call that Ctrl-C interrupts is
cancelled, and cleans up before KeyboardInterrupt is raised. A machine is ended when its `with` block is left, or else
when the process exits. A child of fork(2) cannot use its parent's machines, and does not end them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Self, Unpack, cast, overload

from .api import connect as _connect
from .api import console as _console
from .api import control as _control
from .api import events as _events
from .api import machine as _machine
from .api.attached_disk import AttachedDisk, DiskStatus
from .api.blocking import Blocking, BlockingContext, BlockingMachine, blocking_iterator
from .api.blocking_execution import Execution
from .api.console import EXPECT_TIMEOUT
from .api.events import EVENT_TIMEOUT, Where
from .api.execution import Completed
from .api.options import CopyOptions, DiskOptions, MachineOptions, Size, StrPath
from .api.waiting import WAIT_TIMEOUT
from .boot.config import MachineConfig
from .machine.ending import End
from .network.forward import Forward
from .qmp.events import Event
from .qmp.monitor import COMMAND_TIMEOUT
from .storage.disk import Disk
from .storage.limits import Limits
from .timeouts import COMMAND_START_TIMEOUT, DETACH_TIMEOUT, DRIVER_TIMEOUT, TRAY_TIMEOUT

__all__ = ["ConnectedMachine", "Console", "Events", "Execution", "Machine", "Qmp", "Snapshot", "connect"]

#: pytest omits functions of this module from its tracebacks.
__tracebackhide__ = True


class Machine(BlockingMachine[_machine.Machine]):
    """A virtual machine.

        with vmspawn.sync.Machine(guest="builtin", ram="512M") as machine:
            machine.console.expect("ready")

    `with` starts the machine, and ends it if it still runs at the end of the block. A machine that has ended can
    be started again. The keyword arguments are the fields of MachineConfig; they override `config`. Sizes are bytes or
    texts such as "512M", and times are seconds. vmctl and other programs can control the machine by its name, unless
    `control` is False.

    Raises StartError, UsageError, NotInstalled, VolumeError or ProtocolError if the machine cannot be started.
    """

    def __init__(
        self, config: MachineConfig | None = None, *, control: bool = True, **options: Unpack[MachineOptions]
    ) -> None:
        super().__init__(_machine.Machine(config, control=control, **options))

    def __enter__(self) -> Self:
        self._enter(lambda inner: inner.__aenter__())
        return self

    def __exit__(self, *_: object) -> None:
        self._exit(lambda inner: inner.__aexit__())

    @property
    def config(self) -> MachineConfig:
        """The configuration that the machine is started with."""
        return self._read(lambda inner: inner.config)

    @property
    def name(self) -> str:
        """The machine's name."""
        return self._read(lambda inner: inner.name)

    @property
    def directory(self) -> Path:
        """The machine's runtime directory, with its sockets and QEMU's log."""
        return self._read(lambda inner: inner.directory)

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self._read(lambda inner: inner.pid)

    def status(self) -> str:
        """Return QEMU's run state, such as `running` or `paused`."""
        return self._call(lambda inner: inner.status())

    def power_off(self) -> None:
        """Press the power button (ACPI). `wait` returns after the guest has powered off.

        Raises NotSupported if the guest's state does not let it notice the button.
        """
        return self._call(lambda inner: inner.power_off())

    def reboot(self) -> None:
        """Press the reset button. A paused guest stays paused; any other guest runs afterwards."""
        return self._call(lambda inner: inner.reboot())

    def pause(self) -> None:
        """Stop the guest's processors."""
        return self._call(lambda inner: inner.pause())

    def resume(self) -> None:
        """Continue the guest's processors, or wake a suspended guest up. Raises NotSupported if the guest is off."""
        return self._call(lambda inner: inner.resume())

    def terminate(self) -> None:
        """End the machine without asking the guest. Returns when QEMU accepts `quit`; a QEMU that hangs is killed."""
        return self._call(lambda inner: inner.terminate())

    def wait(self) -> End:
        """Wait until the machine has ended, and return the reason."""
        return self._call(lambda inner: inner.wait())

    @property
    def events(self) -> Events:
        """The machine's events: `machine.events.wait("RESET")`."""
        return Events(self._read(lambda inner: inner.events))

    @property
    def console(self) -> Console:
        """The guest's console: `machine.console.expect("login: ")`. Raises NotSupported with console="native"."""
        return Console(self._read(lambda inner: inner.console))

    def qmp(self, *, read_only: bool = False) -> AbstractContextManager[Qmp]:
        """Open a QMP connection: `with machine.qmp() as qmp: qmp.execute("query-block")`."""
        return BlockingContext(self._read(lambda inner: inner.qmp(read_only=read_only)), Qmp)

    def forward(self, forward: Forward | str | int) -> Forward:
        """Forward a port of the host to the guest, and return a `Forward` with the host's port.

        A string has the syntax of the command line: `[ADDRESS:]PORT:GUESTPORT[/udp]`. A number is the guest's port; a
        free port of 127.0.0.1 is forwarded to it. Raises PortInUse, UsageError, NotSupported or SystemFailure.
        """
        return self._call(lambda inner: inner.forward(forward))

    def remove_forward(self, forward: Forward | str) -> Forward:
        """Remove a forward, and return it. Its open connections stay. Raises NoSuchForward."""
        return self._call(lambda inner: inner.remove_forward(forward))

    def forwards(self) -> list[Forward]:
        """Return the forwards of the machine."""
        return self._call(lambda inner: inner.forwards())

    def snapshot(self, name: str = "") -> Snapshot:
        """Save the machine while it runs: RAM, devices and disks. Without a name, the snapshot gets a number.

        From then on, the guest's writes go to overlays. Raises SnapshotBlocked, SnapshotExists, UsageError,
        SystemFailure, QmpError or Timeout; the machine then continues, and nothing of the snapshot is left.
        """
        return Snapshot(self._call(lambda inner: inner.snapshot(name)))

    def fork(
        self,
        name: str | None = None,
        *,
        keep_disks: bool = False,
        identity: Literal["same", "new"] = "same",
        **options: Unpack[CopyOptions],
    ) -> Machine:
        """Return a copy, as `Snapshot.fork` does, from a temporary snapshot.

        Entering the copy makes the snapshot, and the end of the copy removes it. Entering the copy raises what
        `snapshot` and `Snapshot.fork` raise.
        """
        return Machine._around(
            self._read(lambda inner: inner.fork(name, keep_disks=keep_disks, identity=identity, **options))
        )

    def disks(self) -> list[DiskStatus]:
        """Return all disks, including boot disks."""
        return self._call(lambda inner: inner.disks())

    def attach(
        self,
        disk: Disk | StrPath,
        *,
        wait_guest: bool = False,
        timeout: float = DRIVER_TIMEOUT,
        **options: Unpack[DiskOptions],
    ) -> AttachedDisk:
        """Attach a disk: `machine.attach("data.qcow2", format="qcow2", bus="virtio-scsi")`.

        The keyword arguments are the fields of Disk. A scsi-cd with the path "" is empty. Returns when QEMU has plugged
        in the device.

        With `wait_guest`, returns after the guest's first request to the disk, which Linux makes when it creates the
        disk's node in /dev. Raises Timeout after `timeout` seconds; the disk stays attached.

        Also raises StorageExists, BadConfig, ConfigNotSupported, NoFreePort, QmpError, SystemFailure, or Timeout if
        QEMU does not answer; the attach is undone then, in the background if that takes long.
        """
        return self._call(lambda inner: inner.attach(disk, wait_guest=wait_guest, timeout=timeout, **options))

    def detach(self, name: str, *, timeout: float = DETACH_TIMEOUT, force: bool = False) -> bool:
        """Detach a disk. Returns True when all of it is removed.

        Raises StoragePending if the guest has not released the disk after `timeout` seconds; the removal continues.
        Also raises NoSuchStorage or StorageImmutable.

        `force` takes the image away first, so the guest gets I/O errors. The result is then False if the guest has not
        released the device yet.
        """
        return self._call(lambda inner: inner.detach(name, timeout=timeout, force=force))

    def replace(self, name: str, path: StrPath, *, format: str | None = None, shrink: bool = False) -> int:
        """Replace the image of a disk while the guest uses it, and return the new size in bytes.

        Raises the errors of `attach`, NoSuchStorage or StorageImmutable; the disk then keeps its image.
        """
        return self._call(lambda inner: inner.replace(name, path, format=format, shrink=shrink))

    def resize(self, name: str, size: Size | None = None, *, shrink: bool = False) -> int:
        """Resize a disk and its image, to a number of bytes or a text such as "2G". Returns the size in bytes.

        Without a size, resizes the disk to the image's current size. Raises NoSuchStorage, BadConfig,
        ConfigNotSupported, UsageError or QmpError.
        """
        return self._call(lambda inner: inner.resize(name, size, shrink=shrink))

    def limit(self, name: str, limits: Limits) -> None:
        """Change a disk's I/O limits. `Limits()` removes them. Raises NoSuchStorage, BadConfig or QmpError."""
        return self._call(lambda inner: inner.limit(name, limits))

    def insert_media(
        self, name: str, path: StrPath, *, format: str | None = None, force: bool = False, timeout: float = TRAY_TIMEOUT
    ) -> None:
        """Insert an image into an optical drive.

        Raises StoragePending if the guest keeps the tray locked for `timeout` seconds; `force` opens a locked tray.
        Also raises NoSuchStorage, BadConfig or QmpError.
        """
        return self._call(lambda inner: inner.insert_media(name, path, format=format, force=force, timeout=timeout))

    def eject_media(self, name: str, *, force: bool = False, timeout: float = TRAY_TIMEOUT) -> None:
        """Eject the medium of an optical drive. Raises the errors of `insert_media`."""
        return self._call(lambda inner: inner.eject_media(name, force=force, timeout=timeout))

    def execute(
        self,
        command: Sequence[str | bytes],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        size: tuple[int, int] | None = None,
        stdin: bool = True,
        start_timeout: float = COMMAND_START_TIMEOUT,
    ) -> Execution:
        """Start a command in the guest: `with machine.execute(["cat"]) as command:`.

        `stdin`, `stdout` and `stderr` of the result are streams of bytes. With `size`, in rows and columns, the command
        has a terminal. A terminal without a command runs the login shell.

        Raises CommandFailed if the command cannot be started, Timeout if the agent in the guest does not answer within
        `start_timeout` seconds, NoFreePort, NotSupported or NotConnected.
        """
        return Execution(
            self._call(
                lambda inner: inner.execute(
                    command, env=env, cwd=cwd, user=user, size=size, stdin=stdin, start_timeout=start_timeout
                )
            )
        )

    @overload
    def run(
        self,
        command: str | Sequence[str | bytes],
        *,
        check: bool = False,
        input: str | bytes | None = None,
        timeout: float | None = None,
        text: Literal[True] = True,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
    ) -> Completed[str]: ...

    @overload
    def run(
        self,
        command: str | Sequence[str | bytes],
        *,
        check: bool = False,
        input: str | bytes | None = None,
        timeout: float | None = None,
        text: Literal[False],
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
    ) -> Completed[bytes]: ...

    def run(
        self,
        command: str | Sequence[str | bytes],
        *,
        check: bool = False,
        input: str | bytes | None = None,
        timeout: float | None = None,
        text: bool = True,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
    ) -> Completed[str] | Completed[bytes]:
        """Run a command in the guest until it ends. A string is a command line for the guest's `sh`.

        Without `check`, a command that cannot be started has the status 126 or 127, as in a shell; with `check`, raises
        CommandFailed if the status is not 0. Raises Timeout if the command takes longer than `timeout` seconds, and the
        other errors of `execute`.
        """
        found: Completed[str] | Completed[bytes] = self._call(
            lambda inner: cast(Any, inner).run(
                command, check=check, input=input, timeout=timeout, text=text, env=env, cwd=cwd, user=user
            )
        )
        return found

    def wait_for(self, *conditions: str, timeout: float = WAIT_TIMEOUT) -> None:
        """Wait until all conditions hold: `machine.wait_for("booted", "port=80")`.

        The conditions are `agent` (commands can be run), `booted` (the guest's init reports the end of the boot),
        `console=REGEX` (the console has shown a match), `disk=NAME` (the guest uses the disk), `port=N` (the guest
        listens on the TCP port), `ssh` (the guest's SSH server answers) and `off` (the machine has ended).

        Raises Timeout, which names the conditions that do not hold after `timeout` seconds; MachineEnded; NotSupported
        for a condition that never holds in this guest; UsageError, NoSuchStorage.
        """
        return self._call(lambda inner: inner.wait_for(*conditions, timeout=timeout))

    def copy_to(
        self,
        sources: StrPath | Sequence[StrPath],
        target: str,
        *,
        skip_special: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Copy files and directories of this host to a path in the guest, or into it if it is a directory.

        Permissions, times, links and holes are copied, owners are not. `skip_special` leaves out devices, sockets and
        named pipes, and returns a line about each. `progress` is called with the number of copied bytes and the total.

        Raises CopyFailed, SystemFailure, UsageError, or an error of `execute`; then no incomplete file is left.
        """
        return self._call(lambda inner: inner.copy_to(sources, target, skip_special=skip_special, progress=progress))

    def copy_from(
        self,
        sources: str | Sequence[str],
        target: StrPath,
        *,
        skip_special: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Copy files and directories of the guest to a path of this host, or into it if it is a directory.

        The guest is not trusted: devices, and links that lead out of the source, are refused, or left out with
        `skip_special`. Everything else is as for `copy_to`.
        """
        return self._call(lambda inner: inner.copy_from(sources, target, skip_special=skip_special, progress=progress))


class Snapshot(Blocking[_machine.Snapshot]):
    """A snapshot of a machine.

        snapshot = machine.snapshot()
        with snapshot.fork() as copy:
            copy.run("reboot -f")

    The machine continues, and the snapshot exists until it is removed.
    """

    @property
    def name(self) -> str:
        """The name as MACHINE@NAME."""
        return self._read(lambda inner: inner.name)

    @property
    def pause(self) -> float:
        """The number of seconds that the guest was paused."""
        return self._read(lambda inner: inner.pause)

    @property
    def size(self) -> int:
        """The size of the saved state in bytes."""
        return self._read(lambda inner: inner.size)

    def fork(
        self,
        name: str | None = None,
        *,
        keep_disks: bool = False,
        identity: Literal["same", "new"] = "same",
        **options: Unpack[CopyOptions],
    ) -> Machine:
        """Return a copy, which starts when it is entered, and ends at the end of the `with` block.

        `keep_disks` keeps the copy's disks after its end, as NAME@current. With a new identity, the agent gives the
        guest a host name, a machine ID and MAC addresses of its own, and runs the hooks in the guest's
        /etc/vmspawn/fork.d. The other keyword arguments are the fields of MachineConfig in which the copy differs from
        its source. Raises NoSuchSnapshot, StartError, UsageError or PortInUse when it is entered.
        """
        return Machine._around(
            self._read(lambda inner: inner.fork(name, keep_disks=keep_disks, identity=identity, **options))
        )

    def remove(self) -> None:
        """Remove the snapshot.

        If the machine has ended and this was its last snapshot, writes the overlays to the images, which may take
        minutes.

        Raises NoSuchSnapshot or SnapshotInUse. Raises SystemFailure if the overlays cannot be written: they are kept,
        and the snapshot is removed.
        """
        return self._call(lambda inner: inner.remove())


class ConnectedMachine(Blocking[_connect.ConnectedMachine]):
    """A machine that another process manages. `connect` makes one.

        with vmspawn.sync.connect("demo") as machine:
            machine.attach("data.raw")

    Sizes are in bytes, times in seconds. Images are opened by your program, with its permissions.
    """

    @property
    def name(self) -> str:
        """The machine's name."""
        return self._read(lambda inner: inner.name)

    @property
    def directory(self) -> Path:
        """The machine's runtime directory, with its sockets and QEMU's log."""
        return self._read(lambda inner: inner.directory)

    def status(self) -> str:
        """Return QEMU's run state, such as `running` or `paused`."""
        return self._call(lambda inner: inner.status())

    def power_off(self) -> None:
        """Press the power button (ACPI). `wait` returns after the guest has powered off.

        Raises NotSupported if the guest's state does not let it notice the button.
        """
        return self._call(lambda inner: inner.power_off())

    def reboot(self) -> None:
        """Press the reset button. A paused guest stays paused; any other guest runs afterwards."""
        return self._call(lambda inner: inner.reboot())

    def pause(self) -> None:
        """Stop the guest's processors."""
        return self._call(lambda inner: inner.pause())

    def resume(self) -> None:
        """Continue the guest's processors, or wake a suspended guest up. Raises NotSupported if the guest is off."""
        return self._call(lambda inner: inner.resume())

    def terminate(self) -> None:
        """End the machine without asking the guest. Returns when QEMU accepts `quit`; a QEMU that hangs is killed."""
        return self._call(lambda inner: inner.terminate())

    def wait(self) -> End:
        """Wait until the machine has ended, and return the reason.

        Raises NotConnected if the manager ends first; the machine may then continue without one.
        """
        return self._call(lambda inner: inner.wait())

    @property
    def events(self) -> Events:
        """The machine's events since `connect`: `machine.events.wait("RESET")`."""
        return Events(self._read(lambda inner: inner.events))

    @property
    def console(self) -> Console:
        """The guest's console: `machine.console.expect("login: ")`.

        Reading begins with the first use of this property, with the last 64 KiB of output. From then on, a program that
        blocks its event loop slows the guest down. Raises NotSupported if the machine shares no console.
        """
        return Console(self._read(lambda inner: inner.console))

    def qmp(self, *, read_only: bool = False) -> AbstractContextManager[Qmp]:
        """Open a QMP connection: `with machine.qmp() as qmp: qmp.execute("query-block")`."""
        return BlockingContext(self._read(lambda inner: inner.qmp(read_only=read_only)), Qmp)

    def forward(self, forward: Forward | str | int) -> Forward:
        """Forward a port of the host to the guest, and return a `Forward` with the host's port.

        A string has the syntax of the command line: `[ADDRESS:]PORT:GUESTPORT[/udp]`. A number is the guest's port; a
        free port of 127.0.0.1 is forwarded to it. Raises PortInUse, UsageError, NotSupported or SystemFailure.
        """
        return self._call(lambda inner: inner.forward(forward))

    def remove_forward(self, forward: Forward | str) -> Forward:
        """Remove a forward, and return it. Its open connections stay. Raises NoSuchForward."""
        return self._call(lambda inner: inner.remove_forward(forward))

    def forwards(self) -> list[Forward]:
        """Return the forwards of the machine."""
        return self._call(lambda inner: inner.forwards())

    def snapshot(self, name: str = "") -> Snapshot:
        """Save the machine while it runs: RAM, devices and disks. Raises what `Machine.snapshot` raises."""
        return Snapshot(self._call(lambda inner: inner.snapshot(name)))

    def fork(
        self,
        name: str | None = None,
        *,
        keep_disks: bool = False,
        identity: Literal["same", "new"] = "same",
        **options: Unpack[CopyOptions],
    ) -> Machine:
        """Return a copy, as `Machine.fork` does. This program manages the copy."""
        return Machine._around(
            self._read(lambda inner: inner.fork(name, keep_disks=keep_disks, identity=identity, **options))
        )

    def disks(self) -> list[DiskStatus]:
        """Return all disks, including boot disks."""
        return self._call(lambda inner: inner.disks())

    def attach(
        self,
        disk: Disk | StrPath,
        *,
        wait_guest: bool = False,
        timeout: float = DRIVER_TIMEOUT,
        **options: Unpack[DiskOptions],
    ) -> AttachedDisk:
        """Attach a disk: `machine.attach("data.qcow2", format="qcow2", bus="virtio-scsi")`.

        The keyword arguments are the fields of Disk. A scsi-cd with the path "" is empty. Returns when QEMU has plugged
        in the device.

        With `wait_guest`, returns after the guest's first request to the disk, which Linux makes when it creates the
        disk's node in /dev. Raises Timeout after `timeout` seconds; the disk stays attached.

        Also raises StorageExists, BadConfig, ConfigNotSupported, NoFreePort, QmpError, SystemFailure, or Timeout if
        QEMU does not answer; the attach is undone then, in the background if that takes long.
        """
        return self._call(lambda inner: inner.attach(disk, wait_guest=wait_guest, timeout=timeout, **options))

    def detach(self, name: str, *, timeout: float = DETACH_TIMEOUT, force: bool = False) -> bool:
        """Detach a disk. Returns True when all of it is removed.

        Raises StoragePending if the guest has not released the disk after `timeout` seconds; the removal continues.
        Also raises NoSuchStorage or StorageImmutable.

        `force` takes the image away first, so the guest gets I/O errors. The result is then False if the guest has not
        released the device yet.
        """
        return self._call(lambda inner: inner.detach(name, timeout=timeout, force=force))

    def replace(self, name: str, path: StrPath, *, format: str | None = None, shrink: bool = False) -> int:
        """Replace the image of a disk while the guest uses it, and return the new size in bytes.

        Raises the errors of `attach`, NoSuchStorage or StorageImmutable; the disk then keeps its image.
        """
        return self._call(lambda inner: inner.replace(name, path, format=format, shrink=shrink))

    def resize(self, name: str, size: Size | None = None, *, shrink: bool = False) -> int:
        """Resize a disk and its image, to a number of bytes or a text such as "2G". Returns the size in bytes.

        Without a size, resizes the disk to the image's current size. Raises NoSuchStorage, BadConfig,
        ConfigNotSupported, UsageError or QmpError.
        """
        return self._call(lambda inner: inner.resize(name, size, shrink=shrink))

    def limit(self, name: str, limits: Limits) -> None:
        """Change a disk's I/O limits. `Limits()` removes them. Raises NoSuchStorage, BadConfig or QmpError."""
        return self._call(lambda inner: inner.limit(name, limits))

    def insert_media(
        self, name: str, path: StrPath, *, format: str | None = None, force: bool = False, timeout: float = TRAY_TIMEOUT
    ) -> None:
        """Insert an image into an optical drive.

        Raises StoragePending if the guest keeps the tray locked for `timeout` seconds; `force` opens a locked tray.
        Also raises NoSuchStorage, BadConfig or QmpError.
        """
        return self._call(lambda inner: inner.insert_media(name, path, format=format, force=force, timeout=timeout))

    def eject_media(self, name: str, *, force: bool = False, timeout: float = TRAY_TIMEOUT) -> None:
        """Eject the medium of an optical drive. Raises the errors of `insert_media`."""
        return self._call(lambda inner: inner.eject_media(name, force=force, timeout=timeout))

    def execute(
        self,
        command: Sequence[str | bytes],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        size: tuple[int, int] | None = None,
        stdin: bool = True,
        start_timeout: float = COMMAND_START_TIMEOUT,
    ) -> Execution:
        """Start a command in the guest: `with machine.execute(["cat"]) as command:`.

        `stdin`, `stdout` and `stderr` of the result are streams of bytes. With `size`, in rows and columns, the command
        has a terminal. A terminal without a command runs the login shell.

        Raises CommandFailed if the command cannot be started, Timeout if the agent in the guest does not answer within
        `start_timeout` seconds, NoFreePort, NotSupported or NotConnected.
        """
        return Execution(
            self._call(
                lambda inner: inner.execute(
                    command, env=env, cwd=cwd, user=user, size=size, stdin=stdin, start_timeout=start_timeout
                )
            )
        )

    @overload
    def run(
        self,
        command: str | Sequence[str | bytes],
        *,
        check: bool = False,
        input: str | bytes | None = None,
        timeout: float | None = None,
        text: Literal[True] = True,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
    ) -> Completed[str]: ...

    @overload
    def run(
        self,
        command: str | Sequence[str | bytes],
        *,
        check: bool = False,
        input: str | bytes | None = None,
        timeout: float | None = None,
        text: Literal[False],
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
    ) -> Completed[bytes]: ...

    def run(
        self,
        command: str | Sequence[str | bytes],
        *,
        check: bool = False,
        input: str | bytes | None = None,
        timeout: float | None = None,
        text: bool = True,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
    ) -> Completed[str] | Completed[bytes]:
        """Run a command in the guest until it ends. A string is a command line for the guest's `sh`.

        Without `check`, a command that cannot be started has the status 126 or 127, as in a shell; with `check`, raises
        CommandFailed if the status is not 0. Raises Timeout if the command takes longer than `timeout` seconds, and the
        other errors of `execute`.
        """
        found: Completed[str] | Completed[bytes] = self._call(
            lambda inner: cast(Any, inner).run(
                command, check=check, input=input, timeout=timeout, text=text, env=env, cwd=cwd, user=user
            )
        )
        return found

    def wait_for(self, *conditions: str, timeout: float = WAIT_TIMEOUT) -> None:
        """Wait until all conditions hold: `machine.wait_for("booted", "port=80")`.

        The conditions are `agent` (commands can be run), `booted` (the guest's init reports the end of the boot),
        `console=REGEX` (the console has shown a match), `disk=NAME` (the guest uses the disk), `port=N` (the guest
        listens on the TCP port), `ssh` (the guest's SSH server answers) and `off` (the machine has ended).

        Raises Timeout, which names the conditions that do not hold after `timeout` seconds; MachineEnded; NotSupported
        for a condition that never holds in this guest; UsageError, NoSuchStorage.
        """
        return self._call(lambda inner: inner.wait_for(*conditions, timeout=timeout))

    def copy_to(
        self,
        sources: StrPath | Sequence[StrPath],
        target: str,
        *,
        skip_special: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Copy files and directories of this host to a path in the guest, or into it if it is a directory.

        Permissions, times, links and holes are copied, owners are not. `skip_special` leaves out devices, sockets and
        named pipes, and returns a line about each. `progress` is called with the number of copied bytes and the total.

        Raises CopyFailed, SystemFailure, UsageError, or an error of `execute`; then no incomplete file is left.
        """
        return self._call(lambda inner: inner.copy_to(sources, target, skip_special=skip_special, progress=progress))

    def copy_from(
        self,
        sources: str | Sequence[str],
        target: StrPath,
        *,
        skip_special: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Copy files and directories of the guest to a path of this host, or into it if it is a directory.

        The guest is not trusted: devices, and links that lead out of the source, are refused, or left out with
        `skip_special`. Everything else is as for `copy_to`.
        """
        return self._call(lambda inner: inner.copy_from(sources, target, skip_special=skip_special, progress=progress))


class Console(Blocking[_console.Console]):
    """The guest's console.

        machine.console.expect("login: ", timeout=60)
        machine.console.send_line("root")
        found = machine.console.expect(r"Linux (\\S+)")
        print(found[1], machine.console.before)

    As with pexpect, each `expect` searches after the previous match, and `before` is the text between both matches.
    Output is decoded as UTF-8, and lines end with a line feed. The last 1 MiB is kept.
    """

    @property
    def text(self) -> str:
        """The console's output, at most its last 1 MiB. `expect` does not consume it.

        If another process manages the machine, reading begins when `console` is first used, with the last 64 KiB.
        """
        return self._read(lambda inner: inner.text)

    @property
    def before(self) -> str:
        """The text before the last match of `expect`, or all text that it searched if it failed."""
        return self._read(lambda inner: inner.before)

    def send(self, text: str | bytes) -> None:
        """Type exactly this text on the console: end a line with "\\n", or use `send_line`.

        Raises MachineEnded if the console is closed.
        """
        return self._call(lambda inner: inner.send(text))

    def send_line(self, text: str = "") -> None:
        """Type a line on the console. Raises the errors of `send`."""
        return self._call(lambda inner: inner.send_line(text))

    def expect(self, pattern: str | re.Pattern[str], timeout: float | None = EXPECT_TIMEOUT) -> re.Match[str]:
        """Wait until the console shows text that a regular expression matches, and return the match.

        The search includes earlier output that no `expect` has consumed. In a pattern that is not compiled, `.` also
        matches line ends (re.DOTALL). `timeout` is in seconds; None waits for ever.

        Raises Timeout, or MachineEnded if the machine ends first; both show the console's last lines.
        """
        return self._call(lambda inner: inner.expect(pattern, timeout))

    def last_lines(self, count: int) -> list[str]:
        """Return the console's last lines, safe to print. One empty line replaces several."""
        return self._read(lambda inner: inner.last_lines(count))


class Events(Blocking[_events.Events[Any]]):
    """The events of QEMU and vmspawn (such as StorageAttached); MachineEnded is the last one.

        mark = machine.events.mark
        machine.detach("data", timeout=60)
        event = machine.events.wait("StorageDetached", where={"name": "data"}, since=mark, timeout=10)

    Calling the object returns a stream of the events from now on:

        with machine.events() as stream:
            for event in stream: ...
    """

    def __call__(self) -> AbstractContextManager[Iterator[Event]]:
        """Return a stream of the events from now on, for `with`."""
        return BlockingContext(self._read(lambda inner: inner()), blocking_iterator)

    @property
    def mark(self) -> int:
        """The number of events so far, for `wait(since=…)`."""
        return self._read(lambda inner: inner.mark)

    @property
    def recent(self) -> tuple[Event, ...]:
        """The last 4096 events at most, the oldest first.

        They begin with the machine's start, or with `connect` if another process manages the machine.
        """
        return self._read(lambda inner: inner.recent)

    def wait(
        self, *names: str, where: Where | None = None, timeout: float | None = EVENT_TIMEOUT, since: int | None = None
    ) -> Event:
        """Wait for an event with one of these names, or for any event without names, and return it.

        `where` is a part of the event's data, such as `{"name": "disk0"}`, or a function of the event. `since` is a
        `mark`: events after it are searched first; 0 stands for the first event. `timeout` is in seconds; None waits
        for ever.

        Raises Timeout, MachineEnded if the machine ends first, NotConnected, or EventsLost if events since the mark
        are no longer kept.
        """
        return self._call(lambda inner: inner.wait(*names, where=where, timeout=timeout, since=since))


class Qmp(Blocking[_control.Qmp]):
    """A QMP session.

        with machine.qmp() as qmp:
            print(qmp.execute("query-block"))

    The end of the block closes the session.
    """

    def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        fds: Sequence[int] = (),
        timeout: float = COMMAND_TIMEOUT,
    ) -> object:
        """Run a command and return QEMU's answer. The caller keeps `fds`, which are passed to QEMU.

        Raises QmpError, Timeout or NotConnected.
        """
        return self._call(lambda inner: inner.execute(command, arguments, fds=fds, timeout=timeout))

    def events(self) -> Iterator[Event]:
        """Iterate over the events from now on."""
        return blocking_iterator(self._read(lambda inner: inner.events()))


def connect(name: str) -> AbstractContextManager[ConnectedMachine]:
    """Connect to a running machine by its name: `with vmspawn.sync.connect("demo") as machine:`.

    The machine continues after the `with` statement. Raises NotConnected if no machine has the name, or the
    machine has no manager.
    """
    return BlockingContext(_connect.connect(name), ConnectedMachine)


def __dir__() -> list[str]:
    return list(__all__)

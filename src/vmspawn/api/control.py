# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the methods that all machines have, in this process and in others."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Literal, Protocol, Unpack, overload

from ..machine.ending import End
from ..network.forward import Forward
from ..qmp.events import Event
from ..qmp.monitor import COMMAND_TIMEOUT
from ..storage.disk import Disk
from ..storage.limits import Limits
from ..timeouts import COMMAND_START_TIMEOUT, DETACH_TIMEOUT, DRIVER_TIMEOUT, TRAY_TIMEOUT
from .attached_disk import AttachedDisk, DiskStatus
from .console import Console
from .events import Events
from .execution import Completed, Execution
from .options import CopyOptions, DiskOptions, Size, StrPath
from .waiting import WAIT_TIMEOUT


class Qmp(Protocol):
    """A QMP session.

        async with machine.qmp() as qmp:
            print(await qmp.execute("query-block"))

    The end of the block closes the session.
    """

    async def execute(
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

    def events(self) -> AsyncIterator[Event]:
        """Iterate over the events from now on."""


class Saved(Protocol):
    """A snapshot."""

    @property
    def name(self) -> str:
        """The name as MACHINE@NAME."""

    @property
    def pause(self) -> float:
        """The number of seconds that the guest was paused."""

    @property
    def size(self) -> int:
        """The size of the saved state in bytes."""

    def fork(
        self,
        name: str | None = None,
        *,
        keep_disks: bool = False,
        identity: Literal["same", "new"] = "same",
        **options: Unpack[CopyOptions],
    ) -> AbstractAsyncContextManager[Control]:
        """Return a copy, which starts when it is entered, and ends at the end of the `async with` block."""

    async def remove(self) -> None:
        """Remove the snapshot. Raises NoSuchSnapshot, SnapshotInUse, SystemFailure."""


class Control(Protocol):
    """The methods of a machine. Those that need a running machine raise NotConnected without one."""

    @property
    def name(self) -> str:
        """The machine's name."""

    @property
    def directory(self) -> Path:
        """The machine's runtime directory, with its sockets and QEMU's log."""

    async def status(self) -> str:
        """Return QEMU's run state, such as `running` or `paused`."""

    async def power_off(self) -> None:
        """Press the power button (ACPI). `wait` returns after the guest has powered off.

        Raises NotSupported if the guest's state does not let it notice the button.
        """

    async def reboot(self) -> None:
        """Press the reset button. A paused guest stays paused; any other guest runs afterwards."""

    async def pause(self) -> None:
        """Stop the guest's processors."""

    async def resume(self) -> None:
        """Continue the guest's processors, or wake a suspended guest up. Raises NotSupported if the guest is off."""

    async def terminate(self) -> None:
        """End the machine without asking the guest. Returns when QEMU accepts `quit`; a QEMU that hangs is killed."""

    async def wait(self) -> End:
        """Wait until the machine has ended, and return the reason."""

    async def wait_for(self, *conditions: str, timeout: float = WAIT_TIMEOUT) -> None:
        """Wait until all conditions hold: `await machine.wait_for("booted", "port=80")`.

        The conditions are `agent` (commands can be run), `booted` (the guest's init reports the end of the boot),
        `console=REGEX` (the console has shown a match), `disk=NAME` (the guest uses the disk), `port=N` (the guest
        listens on the TCP port), `ssh` (the guest's SSH server answers) and `off` (the machine has ended).

        Raises Timeout, which names the conditions that do not hold after `timeout` seconds; MachineEnded; NotSupported
        for a condition that never holds in this guest; UsageError, NoSuchStorage.
        """

    @property
    def events(self) -> Events[AbstractAsyncContextManager[AsyncIterator[Event]]]:
        """The machine's events: `await machine.events.wait("RESET")`."""

    @property
    def console(self) -> Console:
        """The guest's console: `await machine.console.expect("login: ")`."""

    def qmp(self, *, read_only: bool = False) -> AbstractAsyncContextManager[Qmp]:
        """Open a QMP connection: `async with machine.qmp() as qmp: await qmp.execute("query-block")`."""

    async def execute(
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
        """Start a command in the guest: `async with await machine.execute(["cat"]) as command:`.

        `stdin`, `stdout` and `stderr` of the result are streams of bytes. With `size`, in rows and columns, the command
        has a terminal. A terminal without a command runs the login shell.

        Raises CommandFailed if the command cannot be started, Timeout if the agent in the guest does not answer within
        `start_timeout` seconds, NoFreePort, NotSupported or NotConnected.
        """

    @overload
    async def run(
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
    async def run(
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

    async def run(
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

    async def snapshot(self, name: str = "") -> Saved:
        """Save the machine while it runs: RAM, devices and disks. Without a name, the snapshot gets a number.

        From then on, the guest's writes go to overlays. Raises SnapshotBlocked, SnapshotExists, UsageError,
        SystemFailure, QmpError or Timeout; the machine then continues, and nothing of the snapshot is left.
        """

    def fork(
        self,
        name: str | None = None,
        *,
        keep_disks: bool = False,
        identity: Literal["same", "new"] = "same",
        **options: Unpack[CopyOptions],
    ) -> AbstractAsyncContextManager[Control]:
        """Return a copy, as `Saved.fork` does, from a temporary snapshot.

        Entering the copy makes the snapshot, and the end of the copy removes it. Entering the copy raises what
        `snapshot` and `Saved.fork` raise.
        """

    async def copy_to(
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

    async def copy_from(
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

    async def forward(self, forward: Forward | str | int) -> Forward:
        """Forward a port of the host to the guest, and return a `Forward` with the host's port.

        A string has the syntax of the command line: `[ADDRESS:]PORT:GUESTPORT[/udp]`. A number is the guest's port; a
        free port of 127.0.0.1 is forwarded to it. Raises PortInUse, UsageError, NotSupported or SystemFailure.
        """

    async def remove_forward(self, forward: Forward | str) -> Forward:
        """Remove a forward, and return it. Its open connections stay. Raises NoSuchForward."""

    async def forwards(self) -> list[Forward]:
        """Return the forwards of the machine."""

    async def disks(self) -> list[DiskStatus]:
        """Return all disks, including boot disks."""

    async def attach(
        self,
        disk: Disk | StrPath,
        *,
        wait_guest: bool = False,
        timeout: float = DRIVER_TIMEOUT,
        **options: Unpack[DiskOptions],
    ) -> AttachedDisk:
        """Attach a disk: `await machine.attach("data.qcow2", format="qcow2", bus="virtio-scsi")`.

        The keyword arguments are the fields of Disk. A scsi-cd with the path "" is empty. Returns when QEMU has plugged
        in the device.

        With `wait_guest`, returns after the guest's first request to the disk, which Linux makes when it creates the
        disk's node in /dev. Raises Timeout after `timeout` seconds; the disk stays attached.

        Also raises StorageExists, BadConfig, ConfigNotSupported, NoFreePort, QmpError, SystemFailure, or Timeout if
        QEMU does not answer; the attach is undone then, in the background if that takes long.
        """

    async def detach(self, name: str, *, timeout: float = DETACH_TIMEOUT, force: bool = False) -> bool:
        """Detach a disk. Returns True when all of it is removed.

        Raises StoragePending if the guest has not released the disk after `timeout` seconds; the removal continues.
        Also raises NoSuchStorage or StorageImmutable.

        `force` takes the image away first, so the guest gets I/O errors. The result is then False if the guest has not
        released the device yet.
        """

    async def replace(self, name: str, path: StrPath, *, format: str | None = None, shrink: bool = False) -> int:
        """Replace the image of a disk while the guest uses it, and return the new size in bytes.

        Raises the errors of `attach`, NoSuchStorage or StorageImmutable; the disk then keeps its image.
        """

    async def resize(self, name: str, size: Size | None = None, *, shrink: bool = False) -> int:
        """Resize a disk and its image, to a number of bytes or a text such as "2G". Returns the size in bytes.

        Without a size, resizes the disk to the image's current size. Raises NoSuchStorage, BadConfig,
        ConfigNotSupported, UsageError or QmpError.
        """

    async def limit(self, name: str, limits: Limits) -> None:
        """Change a disk's I/O limits. `Limits()` removes them. Raises NoSuchStorage, BadConfig or QmpError."""

    async def insert_media(
        self, name: str, path: StrPath, *, format: str | None = None, force: bool = False, timeout: float = TRAY_TIMEOUT
    ) -> None:
        """Insert an image into an optical drive.

        Raises StoragePending if the guest keeps the tray locked for `timeout` seconds; `force` opens a locked tray.
        Also raises NoSuchStorage, BadConfig or QmpError.
        """

    async def eject_media(self, name: str, *, force: bool = False, timeout: float = TRAY_TIMEOUT) -> None:
        """Eject the medium of an optical drive. Raises the errors of `insert_media`."""

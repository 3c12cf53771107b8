# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a program can do to a machine, whichever process manages it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Literal, Protocol, Unpack, overload

from ..machine.ending import End
from ..qmp.events import Event
from ..qmp.monitor import COMMAND_TIMEOUT
from ..storage.disk import Disk
from ..storage.limits import Limits
from ..timeouts import COMMAND_START_TIMEOUT, DETACH_TIMEOUT, DRIVER_TIMEOUT, TRAY_TIMEOUT
from .attached_disk import AttachedDisk, DiskStatus
from .console import Console
from .events import Events
from .execution import Completed, Execution
from .options import DiskOptions, Size, StrPath


class Qmp(Protocol):
    """A QMP connection of your own."""

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        fds: Sequence[int] = (),
        timeout: float = COMMAND_TIMEOUT,
    ) -> object:
        """Run a command and return QEMU's answer. `fds` are passed along and stay yours.

        Raises QmpError, Timeout or NotConnected.
        """

    def events(self) -> AsyncIterator[Event]:
        """The events from now on."""


class Control(Protocol):
    """The verbs of a machine. Each raises NotConnected if the machine does not run."""

    @property
    def name(self) -> str:
        """The machine's name."""

    @property
    def directory(self) -> Path:
        """The machine's runtime directory, with its sockets and QEMU's log."""

    async def status(self) -> str:
        """QEMU's run state, such as `running` or `paused`."""

    async def power_off(self) -> None:
        """Press the power button (ACPI); the guest decides what follows. `wait` returns when it is off.

        Raises NotSupported if the guest is in a state in which it cannot notice the button.
        """

    async def reboot(self) -> None:
        """Reset the machine, as its reset button does. A guest that was paused stays so; any other runs afterwards."""

    async def pause(self) -> None:
        """Stop the guest's processors."""

    async def resume(self) -> None:
        """Let the guest's processors run on; a suspended guest is woken up. Raises NotSupported if it is off."""

    async def terminate(self) -> None:
        """End the machine without asking the guest; returns once QEMU has agreed."""

    async def wait(self) -> End:
        """Wait until the machine has ended, and report how."""

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

        Its streams are like those of asyncio's subprocesses. With a `size`, in rows and columns, it has a terminal and
        may be without arguments: the login shell. Raises CommandFailed if it cannot be started, Timeout if the agent
        in the guest does not answer for `start_timeout` seconds, NoFreePort, NotSupported or NotConnected.
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
        """Run a command in the guest to its end; a string is a command line for the guest's `sh`.

        With `check`, raises CommandFailed if its status is not 0. Raises Timeout if it takes longer than `timeout`
        seconds, and what `execute` raises.
        """

    async def disks(self) -> list[DiskStatus]:
        """All disks, boot disks included."""

    async def attach(
        self,
        disk: Disk | StrPath,
        *,
        wait_guest: bool = False,
        timeout: float = DRIVER_TIMEOUT,
        **options: Unpack[DiskOptions],
    ) -> AttachedDisk:
        """Open a disk's image and plug the disk in; returns once QEMU has plugged in the device.

        The keyword arguments are the fields of Disk. A scsi-cd with the path "" is empty.

        With `wait_guest`, returns once the guest has made its first request to the disk, as Linux does as soon as the
        disk has its node in /dev; raises Timeout if it has made none after `timeout` seconds, and the disk stays.

        Raises StorageExists, BadConfig, ConfigNotSupported, NoFreePort, QmpError, SystemFailure or Timeout; nothing is
        left behind then.
        """

    async def detach(self, name: str, *, timeout: float = DETACH_TIMEOUT, force: bool = False) -> bool:
        """Unplug a disk; returns once nothing of it is left.

        `force` takes the image away from under the guest first; returns False then if the guest has not released the
        device yet. Raises NoSuchStorage, StorageImmutable, or StoragePending if the guest has not released it after
        `timeout` seconds; the removal goes on then.
        """

    async def replace(self, name: str, path: StrPath, *, format: str | None = None, shrink: bool = False) -> int:
        """Put another image in the place of a disk's, while the guest uses it; returns the new size in bytes.

        Raises what `attach` raises, NoSuchStorage or StorageImmutable; the disk keeps its image then.
        """

    async def resize(self, name: str, size: Size | None = None, *, shrink: bool = False) -> int:
        """Resize a disk and its image, to bytes or a text such as "2G"; returns the size in bytes.

        None tells the guest the size that the image has by now. Raises NoSuchStorage, BadConfig, ConfigNotSupported,
        UsageError or QmpError.
        """

    async def limit(self, name: str, limits: Limits) -> None:
        """Change a disk's I/O limits; the default Limits remove them. Raises NoSuchStorage, BadConfig or QmpError."""

    async def insert_media(
        self, name: str, path: StrPath, *, format: str | None = None, force: bool = False, timeout: float = TRAY_TIMEOUT
    ) -> None:
        """Put an image into an optical drive. Raises NoSuchStorage, BadConfig, QmpError, or StoragePending if the guest
        holds the tray locked for `timeout` seconds; `force` opens it all the same."""

    async def eject_media(self, name: str, *, force: bool = False, timeout: float = TRAY_TIMEOUT) -> None:
        """Take the medium out of an optical drive. Raises what `insert_media` raises."""

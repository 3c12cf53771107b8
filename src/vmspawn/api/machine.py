# SPDX-License-Identifier: LGPL-2.1-or-later
"""A machine of your program's own."""

from __future__ import annotations

import asyncio
import os
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Self, Unpack

from ..boot.config import MachineConfig, check
from ..errors import NotConnected, NotSupported
from ..inside.commands import Wanted
from ..inside.inside import Inside
from ..machine.ending import End, MachineEvents
from ..machine.running import Running
from ..storage import disk as disks
from ..storage.disk import Disk
from ..storage.limits import Limits
from ..storage.looks import Look
from ..timeouts import DETACH_TIMEOUT, DRIVER_TIMEOUT, FAREWELL_TIMEOUT, TRAY_TIMEOUT
from .attached_disk import AttachedDisk, DiskStatus, describe, describe_status
from .commands import Guest
from .console import Console
from .control import Qmp
from .events import Events, Record
from .execution import Remote
from .images import open_image
from .launching import start
from .options import DiskOptions, MachineOptions, Size, StrPath, to_config, to_disk, to_size
from .remotes import Local

if TYPE_CHECKING:
    from ..control.server import ControlServer


class Machine(Guest):
    """A virtual machine.

        async with vmspawn.Machine(guest="builtin", ram="512M") as machine:
            await machine.console.expect("ready")

    `async with` starts it, and ends it on the way out if it still runs. The keyword arguments are the fields of
    MachineConfig, and prevail over `config`. Sizes are bytes or texts such as "512M"; times are seconds. vmctl and
    other programs reach the machine by its name, unless `control` is False. A machine that has ended can be started
    again.

    Raises StartError or UsageError if it cannot be started.
    """

    def __init__(
        self, config: MachineConfig | None = None, *, control: bool = True, **options: Unpack[MachineOptions]
    ) -> None:
        self._config = check(to_config(config, options))
        self._control = control
        self._server: ControlServer | None = None
        self._current: _Current | None = None
        self._inside_of_current: Inside | None = None

    def __repr__(self) -> str:
        state = "not started" if self._current is None else f"QEMU is process {self.pid}"
        return f"<Machine {self.name!r}, {state}>"

    async def __aenter__(self) -> Self:
        running = await start(self._config)
        try:
            self._current = _Current(running)
            if self._control:
                self._serve(running)
        except BaseException:
            await running.end()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self._running.end()
            await self._up.recorded
            if self._server is not None:
                await self._server.finish(timeout=FAREWELL_TIMEOUT)
        finally:
            self._stop_serving()

    def _serve(self, running: Running) -> None:
        # Loaded for a machine that is served: others need no Varlink.
        from ..control.server import ControlServer, build_registry

        self._server = ControlServer(running.directory, build_registry(running, self._inside), on_failed=running.failed)

    def _stop_serving(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._inside_of_current is not None:
            self._inside_of_current.close()
            self._inside_of_current = None

    @property
    def _inside(self) -> Inside:
        if self._inside_of_current is None:
            self._inside_of_current = Inside(self._running)
        return self._inside_of_current

    @property
    def _up(self) -> _Current:
        if self._current is None:
            raise NotConnected(f"machine {self.name} does not run")
        return self._current

    @property
    def _running(self) -> Running:
        return self._up.running

    # What it is.

    @property
    def config(self) -> MachineConfig:
        """The machine as it was asked for."""
        return self._config

    @property
    def name(self) -> str:
        """The machine's name."""
        return self._config.name or ""

    @property
    def directory(self) -> Path:
        """The machine's runtime directory, with its sockets and QEMU's log."""
        return Path(self._running.directory)

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self._running.pid

    async def status(self) -> str:
        """QEMU's run state, such as `running` or `paused`."""
        await self._running.ask_status()
        return self._running.status

    # Its life.

    async def power_off(self) -> None:
        """Press the power button (ACPI); the guest decides what follows. `wait` returns when it is off.

        Raises NotSupported if the guest is in a state in which it cannot notice the button.
        """
        await self._running.power.power_off()

    async def reboot(self) -> None:
        """Reset the machine, as its reset button does. A guest that was paused stays so; any other runs afterwards."""
        await self._running.power.reboot()

    async def pause(self) -> None:
        """Stop the guest's processors."""
        await self._running.power.pause()

    async def resume(self) -> None:
        """Let the guest's processors run on; a suspended guest is woken up. Raises NotSupported if it is off."""
        await self._running.power.resume()

    async def terminate(self) -> None:
        """End the machine without asking the guest; returns once QEMU has agreed. A QEMU that does not obey is
        killed."""
        await self._running.terminate()

    async def wait(self) -> End:
        """Wait until the machine has ended, and report how."""
        return await self._running.wait()

    @property
    def events(self) -> Events[MachineEvents]:
        """The machine's events: `await machine.events.wait("RESET")`."""
        return Events(self._up.record, self._running.events)

    @property
    def console(self) -> Console:
        """The guest's console: `await machine.console.expect("login: ")`. Raises NotSupported with console="native"."""
        if self._up.console is None:
            raise NotSupported.with_fields("the console of this machine is QEMU's own ({console=native})")
        return self._up.console

    def qmp(self, *, read_only: bool = False) -> AbstractAsyncContextManager[Qmp]:
        """Open a QMP connection: `async with machine.qmp() as qmp: await qmp.execute("query-block")`."""
        return self._running.qmp(read_only=read_only)

    async def _start_command(self, wanted: Wanted, timeout: float) -> Remote:
        return await Local.start(self._inside.commands, wanted, timeout)

    # Its disks. Images are opened here, as your program.

    async def disks(self) -> list[DiskStatus]:
        """All disks, boot disks included."""
        storage = self._running.storage
        looks = await storage.look()
        return [describe_status(each, looks.get(each.name, Look())) for each in storage]

    async def attach(
        self,
        disk: Disk | StrPath,
        *,
        wait_guest: bool = False,
        timeout: float = DRIVER_TIMEOUT,
        **options: Unpack[DiskOptions],
    ) -> AttachedDisk:
        """Open a disk's image and plug the disk in; returns once QEMU has plugged in the device:
        `await machine.attach("data.qcow2", format="qcow2", bus="virtio-scsi")`.

        The keyword arguments are the fields of Disk. A scsi-cd with the path "" is empty.

        With `wait_guest`, returns once the guest has made its first request to the disk, as Linux does as soon as the
        disk has its node in /dev; raises Timeout if it has made none after `timeout` seconds, and the disk stays.

        Raises StorageExists, BadConfig, ConfigNotSupported, NoFreePort, QmpError, SystemFailure or Timeout; nothing is
        left behind then.
        """
        storage = self._running.storage
        disk = to_disk(disk, options)
        named = disks.with_defaults(disk)
        backing = None
        if disk.path:
            read_only = disks.is_only_read(disk.bus, disk.format, read_only=disk.read_only)
            backing = await open_image(disk.path, read_only=read_only)
        return describe(await storage.attach(named, backing, guest_timeout=timeout if wait_guest else None))

    async def detach(self, name: str, *, timeout: float = DETACH_TIMEOUT, force: bool = False) -> bool:
        """Unplug a disk; returns once nothing of it is left.

        `force` takes the image away from under the guest first; returns False then if the guest has not released the
        device yet. Raises NoSuchStorage, StorageImmutable, or StoragePending if the guest has not released it after
        `timeout` seconds; the removal goes on then.
        """
        return await self._running.storage.detach(name, timeout=timeout, force=force)

    async def replace(self, name: str, path: StrPath, *, format: str | None = None, shrink: bool = False) -> int:
        """Put another image in the place of a disk's, while the guest uses it; returns the new size in bytes.

        Raises what `attach` raises, NoSuchStorage or StorageImmutable; the disk keeps its image then.
        """
        storage = self._running.storage
        read_only = any(each.name == name and each.read_only for each in storage)
        backing = await open_image(os.fspath(path), read_only=read_only)
        return await storage.changes.replace(name, backing, format=format, path=_absolute(path), shrink=shrink)

    async def resize(self, name: str, size: Size | None = None, *, shrink: bool = False) -> int:
        """Resize a disk and its image, to bytes or a text such as "2G"; returns the size in bytes.

        None tells the guest the size that the image has by now. Raises NoSuchStorage, BadConfig, ConfigNotSupported,
        UsageError or QmpError.
        """
        size = None if size is None else to_size("size", size)
        return await self._running.storage.changes.resize(name, size, shrink=shrink)

    async def limit(self, name: str, limits: Limits) -> None:
        """Change a disk's I/O limits; the default Limits remove them. Raises NoSuchStorage, BadConfig or QmpError."""
        await self._running.storage.changes.limit(name, limits)

    async def insert_media(
        self, name: str, path: StrPath, *, format: str | None = None, force: bool = False, timeout: float = TRAY_TIMEOUT
    ) -> None:
        """Put an image into an optical drive. Raises NoSuchStorage, BadConfig, QmpError, or StoragePending if the guest
        holds the tray locked for `timeout` seconds; `force` opens it all the same."""
        storage = self._running.storage
        backing = await open_image(os.fspath(path), read_only=True)
        await storage.changes.insert_media(
            name, backing, format=format, path=_absolute(path), force=force, timeout=timeout
        )

    async def eject_media(self, name: str, *, force: bool = False, timeout: float = TRAY_TIMEOUT) -> None:
        """Take the medium out of an optical drive. Raises what `insert_media` raises."""
        await self._running.storage.changes.eject_media(name, force=force, timeout=timeout)


class _Current:
    """A running machine, with what is kept for its program: events and console output."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.record = Record(running.name)
        running.monitor.witness(self.record.put)
        self.console = self._show_console()
        #: Done when the end of the machine is in the record.
        self.recorded = asyncio.create_task(self._record_end())

    def _show_console(self) -> Console | None:
        try:
            hub = self.running.console
        except NotSupported:
            return None
        console = Console(self.running.name, hub.type)
        hub.attach(console)
        return console

    async def _record_end(self) -> None:
        try:
            self.record.put((await self.running.wait()).event())
        except NotConnected:
            self.record.end()


def _absolute(path: StrPath) -> str:
    return os.path.abspath(path)

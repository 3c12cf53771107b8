# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starts and manages a machine in your own program."""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack, cast

from ..aio.threads import run_cancellable
from ..boot.config import MachineConfig, check_config
from ..errors import NotConnected, NotSupported, UsageError
from ..host.runtime import check_name
from ..inside.commands import Wanted
from ..inside.conditions import Condition, Missing
from ..inside.inside import Inside
from ..inside.waiting import wait_for as inside_wait
from ..machine.ending import End, MachineEvents
from ..machine.running import Running
from ..network.forward import Forward
from ..snapshots.merge import after_end
from ..snapshots.names import free_name
from ..snapshots.removal import remove as remove_snapshot
from ..snapshots.save import save
from ..storage.disk import Disk, is_only_read, with_defaults
from ..storage.disk_views import DiskView
from ..storage.limits import Limits
from ..timeouts import DETACH_TIMEOUT, DRIVER_TIMEOUT, FAREWELL_TIMEOUT, TRAY_TIMEOUT
from .attached_disk import AttachedDisk, DiskStatus, describe, describe_status
from .commands import Guest
from .console import Console
from .control import Qmp
from .events import Events, Record
from .execution import Remote
from .images import open_image
from .launching import start, start_copy
from .options import (
    CopyOptions,
    DiskOptions,
    MachineOptions,
    Size,
    StrPath,
    to_config,
    to_copy_config,
    to_disk,
    to_forward,
    to_size,
)
from .remotes import Local

if TYPE_CHECKING:
    from ..control.server import ControlServer


class Machine(Guest):
    """A virtual machine.

        async with vmspawn.Machine(guest="builtin", ram="512M") as machine:
            await machine.console.expect("ready")

    `async with` starts the machine, and ends it if it still runs at the end of the block. A machine that has ended can
    be started again. The keyword arguments are the fields of MachineConfig; they override `config`. Sizes are bytes or
    texts such as "512M", and times are seconds. vmctl and other programs can control the machine by its name, unless
    `control` is False.

    Raises StartError, UsageError, NotInstalled, VolumeError or ProtocolError if the machine cannot be started.
    """

    # ControlServer is imported for the type checker only, and help() evaluates annotations.
    _server = cast("ControlServer | None", None)
    _current: _Current | None = None
    _inside_of_current: Inside | None = None
    _control = True
    _is_copy = False

    def __init__(
        self, config: MachineConfig | None = None, *, control: bool = True, **options: Unpack[MachineOptions]
    ) -> None:
        self._config = check_config(to_config(config, options))
        self._start: Callable[[], Coroutine[Any, Any, Running]] = partial(start, self._config)
        self._control = control

    @classmethod
    def _of(cls, config: MachineConfig, start: Callable[[], Coroutine[Any, Any, Running]]) -> Machine:
        """Return a copy of a machine. The configuration comes from a snapshot, and is not checked again."""
        machine = object.__new__(cls)
        machine._config, machine._start, machine._is_copy = config, start, True
        return machine

    def __repr__(self) -> str:
        state = "not started" if self._current is None else f"QEMU is process {self.pid}"
        return f"<Machine {self.name!r}, {state}>"

    async def __aenter__(self) -> Self:
        running = await self._start()
        try:
            self._current = _Current(running)
            if self._is_copy:
                self._config = running.config
            if running.incoming is not None:
                # In a copy, this ends the commands of the source, and sets the clock.
                await self._inside.settle()
            if self._control:
                self._serve(running)
            else:
                running.directory.refuse()
        except BaseException:
            await running.end()
            self._stop_serving()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self._running.end()
            await self._up.recorded
            if self._server is not None:
                await self._server.finish(timeout=FAREWELL_TIMEOUT)
            await self._tidy_disks()
        finally:
            self._stop_serving()

    async def _tidy_disks(self) -> None:
        copied = self._running.fork
        machines = {self.name, copied.snapshot.partition("@")[0]} if copied is not None else {self.name}
        for error in await run_cancellable(partial(after_end, *machines)):
            warnings.warn(f"{error}; {error.hint}", RuntimeWarning, stacklevel=2)

    def _serve(self, running: Running) -> None:
        # Only machines with a control socket need Varlink.
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

    # Properties.

    @property
    def config(self) -> MachineConfig:
        """The configuration that the machine is started with."""
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
        """Return QEMU's run state, such as `running` or `paused`."""
        await self._running.ask_status()
        return self._running.status

    # Life cycle.

    async def power_off(self) -> None:
        """Press the power button (ACPI). `wait` returns after the guest has powered off.

        Raises NotSupported if the guest's state does not let it notice the button.
        """
        await self._running.power.power_off()

    async def reboot(self) -> None:
        """Press the reset button. A paused guest stays paused; any other guest runs afterwards."""
        await self._running.power.reboot()

    async def pause(self) -> None:
        """Stop the guest's processors."""
        await self._running.power.pause()

    async def resume(self) -> None:
        """Continue the guest's processors, or wake a suspended guest up. Raises NotSupported if the guest is off."""
        await self._running.power.resume()

    async def terminate(self) -> None:
        """End the machine without asking the guest. Returns when QEMU accepts `quit`; a QEMU that hangs is killed."""
        await self._running.terminate()

    async def wait(self) -> End:
        """Wait until the machine has ended, and return the reason."""
        return await self._running.wait()

    async def _wait_by_manager(self, conditions: Sequence[Condition], timeout: float) -> list[Missing]:
        return await inside_wait(self._running, self._inside, conditions, timeout)

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

    # Network.

    async def forward(self, forward: Forward | str | int) -> Forward:
        """Forward a port of the host to the guest, and return a `Forward` with the host's port.

        A string has the syntax of the command line: `[ADDRESS:]PORT:GUESTPORT[/udp]`. A number is the guest's port; a
        free port of 127.0.0.1 is forwarded to it. Raises PortInUse, UsageError, NotSupported or SystemFailure.
        """
        return await self._running.forwards.add(to_forward(forward))

    async def remove_forward(self, forward: Forward | str) -> Forward:
        """Remove a forward, and return it. Its open connections stay. Raises NoSuchForward."""
        return await self._running.forwards.remove(to_forward(forward))

    async def forwards(self) -> list[Forward]:
        """Return the forwards of the machine."""
        return await self._running.forwards.list()

    # Snapshots.

    async def snapshot(self, name: str = "") -> Snapshot:
        """Save the machine while it runs: RAM, devices and disks. Without a name, the snapshot gets a number.

        From then on, the guest's writes go to overlays. Raises SnapshotBlocked, SnapshotExists, UsageError,
        SystemFailure, QmpError or Timeout; the machine then continues, and nothing of the snapshot is left.
        """
        saved = await save(self._running, name)
        state = saved.manifest.state
        return Snapshot(saved.manifest.full_name, saved.pause, state.total if state is not None else 0)

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
        return copy_of(self.name, self._save_temporarily, name, keep_disks, identity, options)

    async def _save_temporarily(self) -> str:
        return (await asyncio.create_task(save(self._running, is_temporary=True))).manifest.full_name

    # Disks. Your program opens the images, with its permissions.

    async def disks(self) -> list[DiskStatus]:
        """Return all disks, including boot disks."""
        storage = self._running.storage
        views = await storage.views()
        return [describe_status(each, views.get(each.name, DiskView())) for each in storage]

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
        storage = self._running.storage
        disk = to_disk(disk, options)
        named = with_defaults(disk)
        backing = None
        if disk.path:
            read_only = is_only_read(disk.bus, disk.format, read_only=disk.read_only)
            backing = await open_image(disk.path, read_only=read_only)
        return describe(await storage.attach(named, backing, guest_timeout=timeout if wait_guest else None))

    async def detach(self, name: str, *, timeout: float = DETACH_TIMEOUT, force: bool = False) -> bool:
        """Detach a disk. Returns True when all of it is removed.

        Raises StoragePending if the guest has not released the disk after `timeout` seconds; the removal continues.
        Also raises NoSuchStorage or StorageImmutable.

        `force` takes the image away first, so the guest gets I/O errors. The result is then False if the guest has not
        released the device yet.
        """
        return await self._running.storage.detach(name, timeout=timeout, force=force)

    async def replace(self, name: str, path: StrPath, *, format: str | None = None, shrink: bool = False) -> int:
        """Replace the image of a disk while the guest uses it, and return the new size in bytes.

        Raises the errors of `attach`, NoSuchStorage or StorageImmutable; the disk then keeps its image.
        """
        storage = self._running.storage
        read_only = any(each.name == name and each.read_only for each in storage)
        backing = await open_image(os.fspath(path), read_only=read_only)
        return await storage.changes.replace(name, backing, format=format, path=_absolute(path), shrink=shrink)

    async def resize(self, name: str, size: Size | None = None, *, shrink: bool = False) -> int:
        """Resize a disk and its image, to a number of bytes or a text such as "2G". Returns the size in bytes.

        Without a size, resizes the disk to the image's current size. Raises NoSuchStorage, BadConfig,
        ConfigNotSupported, UsageError or QmpError.
        """
        size = None if size is None else to_size("size", size)
        return await self._running.storage.changes.resize(name, size, shrink=shrink)

    async def limit(self, name: str, limits: Limits) -> None:
        """Change a disk's I/O limits. `Limits()` removes them. Raises NoSuchStorage, BadConfig or QmpError."""
        await self._running.storage.changes.limit(name, limits)

    async def insert_media(
        self, name: str, path: StrPath, *, format: str | None = None, force: bool = False, timeout: float = TRAY_TIMEOUT
    ) -> None:
        """Insert an image into an optical drive.

        Raises StoragePending if the guest keeps the tray locked for `timeout` seconds; `force` opens a locked tray.
        Also raises NoSuchStorage, BadConfig or QmpError.
        """
        storage = self._running.storage
        backing = await open_image(os.fspath(path), read_only=True)
        await storage.changes.insert_media(
            name, backing, format=format, path=_absolute(path), force=force, timeout=timeout
        )

    async def eject_media(self, name: str, *, force: bool = False, timeout: float = TRAY_TIMEOUT) -> None:
        """Eject the medium of an optical drive. Raises the errors of `insert_media`."""
        await self._running.storage.changes.eject_media(name, force=force, timeout=timeout)


class Snapshot:
    """A snapshot of a machine.

        snapshot = await machine.snapshot()
        async with snapshot.fork() as copy:
            await copy.run("reboot -f")

    The machine continues, and the snapshot exists until it is removed.
    """

    def __init__(self, name: str, pause: float, size: int) -> None:
        self._name, self._pause, self._size = name, pause, size

    def __repr__(self) -> str:
        return f"<Snapshot {self._name!r}>"

    @property
    def name(self) -> str:
        """The name as MACHINE@NAME."""
        return self._name

    @property
    def pause(self) -> float:
        """The number of seconds that the guest was paused."""
        return self._pause

    @property
    def size(self) -> int:
        """The size of the saved state in bytes."""
        return self._size

    def fork(
        self,
        name: str | None = None,
        *,
        keep_disks: bool = False,
        identity: Literal["same", "new"] = "same",
        **options: Unpack[CopyOptions],
    ) -> Machine:
        """Return a copy, which starts when it is entered, and ends at the end of the `async with` block.

        `keep_disks` keeps the copy's disks after its end, as NAME@current. With a new identity, the agent gives the
        guest a host name, a machine ID and MAC addresses of its own, and runs the hooks in the guest's
        /etc/vmspawn/fork.d. The other keyword arguments are the fields of MachineConfig in which the copy differs from
        its source. Raises NoSuchSnapshot, StartError, UsageError or PortInUse when it is entered.
        """
        machine = self.name.partition("@")[0]
        config = to_copy_config(check_name(name) if name else free_name(machine), options)
        return Machine._of(
            config, partial(start_copy, config, self.name, keep_disks=keep_disks, new_identity=_is_new(identity))
        )

    async def remove(self) -> None:
        """Remove the snapshot.

        If the machine has ended and this was its last snapshot, writes the overlays to the images, which may take
        minutes.

        Raises NoSuchSnapshot or SnapshotInUse. Raises SystemFailure if the overlays cannot be written: they are kept,
        and the snapshot is removed.
        """
        await run_cancellable(partial(remove_snapshot, self.name))


def copy_of(
    machine: str,
    save_it: Callable[[], Awaitable[str]],
    name: str | None,
    keep_disks: bool,
    identity: str,
    options: CopyOptions,
) -> Machine:
    """Return a copy of a machine. `save_it` makes a temporary snapshot and returns its full name."""
    config = to_copy_config(check_name(name) if name else free_name(machine), options)
    new_identity = _is_new(identity)

    async def start_saved() -> Running:
        snapshot = await save_it()
        try:
            return await start_copy(config, snapshot, keep_disks=keep_disks, new_identity=new_identity)
        except BaseException:
            await asyncio.to_thread(after_end, machine)
            raise

    return Machine._of(config, start_saved)


class _Current:
    """A running machine, with its recorded events and console output."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.record = Record(running.name)
        running.monitor.witness(self.record.put)
        self.console = self._show_console()
        #: The task that ends when the machine's end is recorded.
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


def _is_new(identity: str) -> bool:
    if identity not in ("same", "new"):
        raise UsageError(f"identity={identity!r} is not known", hint="there are: same, new")
    return identity == "new"


def _absolute(path: StrPath) -> str:
    return os.path.abspath(path)

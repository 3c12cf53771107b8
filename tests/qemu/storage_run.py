# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs operations on a machine's disks one by one, each with its expected result.

The guest is the firmware, which releases no PCI device, so that the removal of a PCI disk is pending until a reset. A
firmware that was reset may reset itself once more, at any later time; so from the first reset on, a pending disk may
disappear at any time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Coroutine
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from tests.background import Background
from tests.commands import DEADLINE
from tests.conftest import make_raw
from tests.machines import Machine, Resources, event_named, idle_machine
from tests.qemu.storage_model import (
    PCI_BUSES,
    Error,
    ExpectedDisk,
    ImageFile,
    Model,
    Picture,
    check_equal,
    check_one_line,
    look,
    make_image,
)
from vmspawn import Disk
from vmspawn.boot.qemu import find_qemu
from vmspawn.errors import (
    BadConfig,
    ConfigNotSupported,
    NoFreePort,
    NoSuchStorage,
    QmpError,
    StorageExists,
    StoragePending,
    SystemFailure,
    VmspawnError,
)
from vmspawn.storage.attached_disk import DETACHED_EVENT, DETACHING_EVENT, AttachedDisk
from vmspawn.storage.backing import inspect_descriptor, open_disk
from vmspawn.storage.limits import NO_LIMITS, Limits

#: Seconds that a detach waits for firmware, which does not release disks.
SHORT = 0.05
#: Ports of the machine: few, so that they run out.
PORTS = 3

#: The arguments of `attach_invalid` and `replace_by_invalid`.
UNATTACHABLE = ("wrong format", "missing format", "broken", "no file", "empty", "no medium", "boot disk")
UNUSABLE = ("itself", "broken", "wrong format", "read-only")

_T = TypeVar("_T")


class Run:
    """A machine, the model of its disks, and the operations.

    Each operation checks its own result; `check` compares the machine with the model.
    """

    def __init__(self, qemu: str, folder: Path) -> None:
        """Start a machine whose images are in `folder`. Call `end` afterwards."""
        self.folder = folder
        self.model = Model()
        self.paused = False
        self.was_reset = False
        self._stack = ExitStack()
        self._background = self._stack.enter_context(Background(DEADLINE))
        self.machine = self.wait(_start(qemu, folder))
        self._stack.callback(lambda: self.wait(self.machine.close()))
        self.namespaces = find_qemu(qemu).has_namespaces
        self._sets_linger = self.wait(_do_sets_linger(self.machine))
        self._before = self.wait(_resources(self.machine))
        self._empty = self.wait(look(self.machine, folder))

    def wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine on the machine's loop."""
        return self._background.wait(work)

    def end(self, *, check: bool = True) -> None:
        """Detach all disks, check that nothing is left behind, and end the machine."""
        try:
            if check:
                self.wait(self._clear())
                check_equal(self.wait(self._look()), self._empty)
                check_equal(self.wait(_resources(self.machine)), self._before)
        finally:
            self._stack.close()

    # Observations.

    def disks(self, *buses: str) -> list[ExpectedDisk]:
        """Return the disks, or the disks on some buses, in a constant order."""
        return [disk for _, disk in sorted(self.model.disks.items()) if not buses or disk.bus in buses]

    def file(self, image_format: str, size: int, *, reuse: bool) -> ImageFile:
        """Return a file that no disk uses: a formerly used one, or a new one."""
        idle = self.model.idle_files(image_format)
        if reuse and idle:
            return idle[0]
        made = make_image(self.folder, f"{image_format}{len(self.model.files)}", image_format, size)
        self.model.files.append(made)
        return made

    def path(self, file: ImageFile) -> str:
        """Return the path of a file."""
        return str(self.folder / file.name)

    def check(self) -> None:
        """Compare the machine with the model."""
        actual = self.wait(self._look()).changes_since(self._empty)
        expected = self.model.picture()
        if self._sets_linger and self.paused:
            assert set(expected.open_images) <= set(actual.open_images)
            actual = replace(actual, open_images=expected.open_images, passed=0)
        check_equal(actual, expected)

    async def _look(self) -> Picture:
        async with asyncio.timeout(DEADLINE):
            while True:
                names = await self._settle()
                picture = await look(self.machine, self.folder)
                if names == await self._settle():
                    return picture

    async def _settle(self) -> set[str]:
        """Wait for removals, and remove disks that disappeared from the model; returns the other disks' names."""
        storage = self.machine.storage
        devices = await self.machine.monitor.execute("qom-list", {"path": "/machine/peripheral"})
        present = {each["name"] for each in devices}
        for each in storage:
            # QEMU forgets a device first, and reports that when nothing uses the device's memory any more.
            if each.gone.is_set() or each.identifiers.device not in present:
                await each.gone.wait()
                assert each.unwinding is not None
                await asyncio.wait({each.unwinding})
        while not self.paused and storage._context.hotplug.deferred:
            # The removal of these objects is under way, on the same monitor.
            await self.machine.monitor.execute("query-status")
        names = {each.name for each in storage}
        for disk in self.disks():
            if disk.name not in names and self.may_vanish(disk):
                del self.model.disks[disk.name]
        return names

    def may_vanish(self, disk: ExpectedDisk) -> bool:
        """Return whether a disk may disappear at any moment, because the firmware may reset itself."""
        return disk.asked and self.was_reset

    def _attachment(self, disk: ExpectedDisk) -> AttachedDisk | None:
        return next((each for each in self.machine.storage if each.name == disk.name), None)

    # Execution.

    def expect(self, work: Coroutine[Any, Any, _T], error: Error | None, disk: ExpectedDisk | None = None) -> bool:
        """Await `work`, which must succeed, or fail with `error`; returns whether it succeeded.

        Work on a disk that may disappear at any moment may also fail because the disk has disappeared.
        """
        vanishing = disk is not None and self.may_vanish(disk)
        try:
            self.wait(work)
        except VmspawnError as caught:
            check_one_line(caught)
            gone = vanishing and isinstance(caught, NoSuchStorage | StoragePending)
            if not gone and (error is None or not isinstance(caught, error)):
                raise
            return False
        assert error is None or vanishing, f"there was no {error.__name__}"
        return True

    # The operations.

    def attach(
        self,
        name: str,
        bus: str,
        *,
        image_format: str = "raw",
        size: int = 1 << 20,
        reuse: bool = False,
        read_only: bool = False,
        limits: Limits = NO_LIMITS,
        **options: Any,
    ) -> None:
        """Attach a disk. `bus` may be `empty-cd`."""
        other = self.model.disks.get(name)
        if other is not None and self.may_vanish(other):
            return
        file = None if bus == "empty-cd" else self.file(image_format, size, reuse=reuse)
        bus = "scsi-cd" if bus == "empty-cd" else bus
        ports = PORTS - sum(disk.on_pci for disk in self.disks())
        if not ports and any(map(self.may_vanish, self.disks(*PCI_BUSES))):
            return
        error: Error | None = StorageExists if other else NoFreePort if bus in PCI_BUSES and not ports else None
        if bus == "nvme-ns" and not self.namespaces:
            error = error or ConfigNotSupported
        wanted = Disk(
            self.path(file) if file else "",
            name,
            bus,
            file.format if file else None,
            read_only=read_only,
            limits=limits,
            **options,
        )
        if not self.expect(self.machine.attach(wanted), error):
            return
        real_bus = ("virtio-blk" if ports else "virtio-scsi") if bus == "auto" else bus
        self.model.disks[name] = ExpectedDisk(
            name,
            real_bus,
            read_only or real_bus == "scsi-cd",
            file,
            file.size if file else 0,
            thread=bool(options.get("thread")),
        )

    def attach_again(self, disk: ExpectedDisk, *, read_only: bool) -> None:
        """Attach the file of a disk again, under another name."""
        file = disk.image
        if file is None or self.may_vanish(disk):
            return
        taken = "again" in self.model.disks or self.model.holds(file, writing=not read_only)
        error = StorageExists if taken else None
        wanted = Disk(self.path(file), "again", "virtio-scsi", file.format, read_only=read_only)
        if self.expect(self.machine.attach(wanted), error):
            self.model.disks["again"] = ExpectedDisk("again", "virtio-scsi", read_only, file, file.size)

    def attach_invalid(self, what: str) -> None:
        """Attempt an attach that is refused and leaves nothing behind."""
        raw = self.path(self.file("raw", 1 << 20, reuse=True))
        qcow2 = self.path(self.file("qcow2", 1 << 20, reuse=True))
        refused: dict[str, tuple[Disk, Error]] = {
            "wrong format": (Disk(raw, "x", "virtio-scsi", "qcow2"), BadConfig),
            "missing format": (Disk(qcow2, "x", "virtio-scsi"), BadConfig),
            "broken": (Disk(self._broken(), "x", "virtio-scsi", "qcow2"), QmpError),
            "no file": (Disk(str(self.folder / "none"), "x", "virtio-scsi"), SystemFailure),
            "empty": (Disk(str(make_raw(self.folder / "empty", 0)), "x", "virtio-scsi"), BadConfig),
            "no medium": (Disk("", "x", "virtio-scsi"), BadConfig),
            "boot disk": (Disk(str(self.machine.config.image), "x", "virtio-scsi"), StorageExists),
        }
        wanted, error = refused[what]
        self.expect(self.machine.attach(wanted), error)

    def attach_descriptor(self, name: str, flags: int) -> None:
        """Attach an open file: it makes a read-only disk, makes a writable one, or is refused."""
        if name in self.model.disks:
            return
        file = self.file("raw", 1 << 20, reuse=True)
        fd = os.open(self.path(file), flags | os.O_CLOEXEC)
        try:
            backing = inspect_descriptor(fd)
        except BadConfig:
            os.close(fd)
            assert flags in (os.O_PATH, os.O_WRONLY, os.O_RDWR | os.O_SYNC)
            return
        assert self.expect(self.machine.attach_backing(Disk("", name, "virtio-scsi"), backing), None)
        read_only = flags & os.O_ACCMODE == os.O_RDONLY
        self.model.disks[name] = ExpectedDisk(name, "virtio-scsi", read_only, file, file.size)

    def detach(self, disk: ExpectedDisk, *, force: bool = False) -> None:
        """Detach a disk. Firmware does not release PCI disks."""
        # After the first request, the removal completes if the firmware resets itself.
        disk.asked = disk.on_pci
        self.expect(self._detach(disk, force=force), StoragePending if disk.on_pci and not force else None, disk)
        if not disk.on_pci:
            del self.model.disks[disk.name]
            return
        disk.detaching = True
        if force:
            disk.forced, disk.image = True, None

    async def _detach(self, disk: ExpectedDisk, *, force: bool) -> None:
        asked = asyncio.create_task(self._events(disk, DETACHING_EVENT, DETACHED_EVENT))
        await asyncio.sleep(0)
        timeout = SHORT if disk.on_pci else DEADLINE
        try:
            gone = await self.machine.detach(disk.name, timeout=timeout, force=force)
            assert gone is (not disk.on_pci) or self.may_vanish(disk)
        finally:
            await asked

    async def _events(self, disk: ExpectedDisk, *names: str) -> None:
        """Wait for an event of one of these names about the disk."""
        async with asyncio.timeout(DEADLINE):
            with self.machine.events() as events:
                async for event in events:
                    if event.name in names and (event.data or {}).get("name") == disk.name:
                        return

    def remove_by_qmp(self, disk: ExpectedDisk) -> None:
        """Unplug the device as a QMP client would, without the manager's knowledge."""
        attachment = self._attachment(disk)
        if attachment is not None:
            self.wait(self._remove_by_qmp(attachment, disk))
        if disk.on_pci:
            disk.asked = True
        else:
            del self.model.disks[disk.name]

    async def _remove_by_qmp(self, attachment: AttachedDisk, disk: ExpectedDisk) -> None:
        gone = asyncio.create_task(self._events(disk, DETACHED_EVENT)) if not disk.on_pci else None
        await asyncio.sleep(0)
        async with self.machine.qmp() as client:
            try:
                await client.execute("device_del", {"id": attachment.identifiers.device})
            except QmpError as error:
                if not self.may_vanish(disk) and "already in the process of unplug" not in error.description:
                    raise
        if gone is not None:
            await gone

    def replace(self, disk: ExpectedDisk, *, image_format: str, size: int, reuse: bool, shrink: bool) -> None:
        """Replace the image of a disk."""
        file = self.file(image_format, size, reuse=reuse)
        work = self.machine.replace(disk.name, self.path(file), format=file.format, shrink=shrink)
        if self.expect(work, disk.replace_error(file, shrink=shrink), disk):
            disk.image, disk.size = file, file.size

    def replace_by_invalid(self, disk: ExpectedDisk, what: str) -> None:
        """Attempt a replacement that is refused and leaves the disk as it was."""
        if disk.detaching or disk.bus == "scsi-cd" or self.may_vanish(disk):
            return
        if what == "itself" and disk.image is not None and not disk.read_only:
            self.expect(self.machine.replace(disk.name, self.path(disk.image), format=disk.image.format), StorageExists)
        elif what == "broken":
            self.expect(self.machine.replace(disk.name, self._broken(), format="qcow2"), QmpError)
        elif what == "wrong format":
            path = self.path(self.file("raw", disk.size, reuse=True))
            self.expect(self.machine.replace(disk.name, path, format="qcow2"), BadConfig)
        elif what == "read-only" and not disk.read_only:
            backing = open_disk(self.path(self.file("raw", disk.size, reuse=False)), read_only=True)
            self.expect(self.machine.replace_backing(disk.name, backing), SystemFailure)

    def _broken(self) -> str:
        """Make a file that begins like a qcow2 image but is not one."""
        path = self.folder / "broken"
        path.write_bytes(b"QFI\xfb" + bytes(1 << 16))
        return str(path)

    def resize(self, disk: ExpectedDisk, *, size: int, shrink: bool) -> None:
        """Resize a disk."""
        if self.expect(
            self.machine.resize(disk.name, size, shrink=shrink), disk.resize_error(size, shrink=shrink), disk
        ):
            disk.size = size
            assert disk.image is not None
            disk.image.size = size

    def limit(self, disk: ExpectedDisk, limits: Limits) -> None:
        """Set or remove a disk's limits."""
        error: Error | None = StoragePending if disk.detaching else None
        self.expect(self.machine.limit(disk.name, limits), error, disk)

    def insert(self, disk: ExpectedDisk, *, image_format: str, size: int, force: bool) -> None:
        """Insert a medium."""
        file = self.file(image_format, size, reuse=True)
        work = self.machine.insert_media(disk.name, self.path(file), format=file.format, force=force)
        if self.expect(work, None if disk.bus == "scsi-cd" else BadConfig, disk):
            disk.image, disk.size = file, file.size

    def eject(self, disk: ExpectedDisk, *, force: bool) -> None:
        """Eject the medium."""
        if self.expect(
            self.machine.eject_media(disk.name, force=force), None if disk.bus == "scsi-cd" else BadConfig, disk
        ):
            disk.image, disk.size = None, 0

    def pause(self) -> None:
        """Stop the guest."""
        self.wait(self.machine.pause())
        self.paused = True

    def resume(self) -> None:
        """Resume the guest."""
        self.wait(self.machine.resume())
        self.paused = False

    def reset(self) -> None:
        """Reset the machine, which completes the requested removals."""
        asked = [disk for disk in self.disks() if disk.asked]
        self.wait(self._reset(asked))
        self.was_reset = True
        for disk in asked:
            del self.model.disks[disk.name]

    async def _reset(self, asked: list[ExpectedDisk]) -> None:
        leaving = [each for disk in asked if (each := self._attachment(disk))]
        reset = asyncio.create_task(event_named(self.machine, "RESET"))
        await asyncio.sleep(0)
        await self.machine.reboot()
        await reset
        async with asyncio.timeout(DEADLINE):
            for each in leaving:
                await each.gone.wait()
                assert each.unwinding is not None
                await asyncio.wait({each.unwinding})

    async def _clear(self) -> None:
        """Detach all disks."""
        if self.paused:
            await self.machine.resume()
            self.paused = False
        names = [each.name for each in self.machine.storage if not each.is_boot]
        for name in names:
            with contextlib.suppress(StoragePending, NoSuchStorage):
                await self.machine.detach(name, timeout=SHORT)
        await self.machine.reboot()
        for name in names:
            with contextlib.suppress(NoSuchStorage):
                await self.machine.detach(name, timeout=DEADLINE)
        await self._settle()


async def _resources(machine: Machine) -> Resources:
    """Return the resources without query-pci, which shows devices behind ports only after the firmware's start."""
    return replace(await Resources.of(machine), pci_devices=frozenset())


async def _do_sets_linger(machine: Machine) -> bool:
    """Return whether QEMU removes a descriptor set only while the guest runs (docs/qemu.md, "Descriptor sets")."""
    await machine.pause()
    fd = os.open(os.devnull, os.O_RDONLY)
    try:
        number = (await machine.monitor.execute("add-fd", fds=[fd]))["fdset-id"]
    finally:
        os.close(fd)
    await machine.monitor.execute("remove-fd", {"fdset-id": number})
    found = await machine.monitor.execute("query-fdsets")
    await machine.resume()
    do_linger = number in {each["fdset-id"] for each in found}
    if do_linger:
        await machine.monitor.execute("remove-fd", {"fdset-id": number})
    return do_linger


async def _start(qemu: str, folder: Path) -> Machine:
    # Firmware does not release the controller of namespaces, so a namespace at boot keeps the controller.
    has_namespaces = find_qemu(qemu).has_namespaces
    at_boot = (Disk(str(make_raw(folder / "at-boot", 1 << 20)), bus="nvme-ns"),) if has_namespaces else ()
    machine = idle_machine(qemu, folder, hotplug_ports=PORTS + 1, extra_disks=at_boot)
    await machine.__aenter__()
    # The disks with an I/O thread share a controller, which is plugged in for the first of them, and keeps a port.
    await machine.attach(Disk(str(make_raw(folder / "first", 1 << 20)), "first", "virtio-scsi", thread=True))
    await machine.detach("first")
    return machine

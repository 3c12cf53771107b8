# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attaches and detaches disks while the machine runs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from ..errors import NotConnected, QmpError, StoragePending, Timeout, VmspawnError
from ..hotplug import pending
from ..hotplug.attachment import State
from ..hotplug.hotplug import Hotplug
from ..hotplug.occupied import occupied_places
from ..hotplug.places import THREADED_SCSI_CONTROLLER, Layout, Place, Pool, controller_of
from ..qmp.events import Event
from ..timeouts import DETACH_TIMEOUT
from . import (
    admission,
    block_graph,
    buses,
    disk_views,
    displaced,
    failures,
    formats,
    guest_driver,
    image_nodes,
    images,
    media,
    statistics,
    swap,
)
from .attached_disk import AttachedDisk
from .backing import Backing
from .block_graph import BlockGraph
from .changes import CHANGE_TIMEOUT, Changes, check_not_boot
from .context import Context
from .controllers import Controllers
from .disk import Disk
from .disk_views import DiskView
from .explain import STORAGE_HINT, explain
from .freeze import Freeze
from .image import Image
from .nodes import Identifiers
from .statistics import Statistics

_PENDING_HINT = (
    "the disk will be removed when the guest releases it; repeat the command to wait for that, or take the image "
    "away now with {force=True}"
)

#: Seconds within which QEMU must list the machine's PCI devices.
_LOOK_TIMEOUT = 2.0

#: Seconds that the detach of a controller's last disk waits for the controller's removal, which continues after that.
_CONTROLLER_TIMEOUT = 2.0

_USED_HINT = "the disk will be removed when no QMP client uses the image any more"


class BootDisk(Protocol):
    """A disk that QEMU was started with."""

    @property
    def disk(self) -> Disk:
        """The disk that the user requested."""

    @property
    def identifiers(self) -> Identifiers:
        """The disk's names in QEMU."""

    @property
    def place(self) -> Place:
        """The disk's place."""

    @property
    def serial(self) -> str:
        """The disk's serial number."""

    @property
    def images(self) -> Sequence[Image]:
        """The disk's image, or an empty sequence for an empty drive."""

    @property
    def is_boot(self) -> bool:
        """True if the disk cannot be detached while the machine runs."""


class Storage:
    """The disks of a running machine."""

    def __init__(
        self,
        hotplug: Hotplug,
        layout: Layout,
        *,
        boot_disks: Iterable[BootDisk] = (),
        saved: Mapping[str, Mapping[str, Any]] = {},
    ) -> None:
        """Begin with the disks that exist already.

        `boot_disks` are the disks of a QEMU that was just started. `saved` has the sections of another manager's
        journal, whose disks this manager adopts. Raises KeyError, TypeError or ValueError if a section is invalid.
        """
        self._hotplug = hotplug
        boot_disks = tuple(boot_disks)
        at_boot = () if saved else buses.controllers_at_boot(each.disk.bus for each in boot_disks)
        controllers = Controllers(hotplug, layout, saved, at_boot)

        def threaded_place() -> Mapping[str, object]:
            """Return the place of the SCSI controller with an I/O thread, for older managers.

            They look for it in the section of disks, because they have no section of controllers.
            """
            place = controllers.place_of(THREADED_SCSI_CONTROLLER)
            return {"threaded-scsi": place and list(place)}

        register = hotplug.register(
            AttachedDisk.kind,
            lambda record: AttachedDisk.from_state(record, controllers.pool_of),
            saved.get(AttachedDisk.kind, {}),
            threaded_place,
            self._on_refused,
        )
        self._context = Context(hotplug, layout, controllers, register)
        #: The changes of disks that stay attached.
        self.changes = Changes(self._context)
        for each in boot_disks:
            self._add_boot_disk(each, controllers.pool_of(each.disk.bus, each.place))
        hotplug.monitor.listen(self._event)

    async def _on_refused(self, attached: AttachedDisk, error: VmspawnError) -> str:
        from .refusals import on_refused

        return await on_refused(self._context, attached, error)

    def __iter__(self) -> Iterator[AttachedDisk]:
        return iter(self._context.register)

    @property
    def ports_free(self) -> int:
        """The number of PCI devices that can still be plugged in."""
        return self._context.layout.pci.free

    @property
    def ports(self) -> int:
        """The number of places for hot-plugged PCI devices."""
        return len(self._context.layout.pci.places)

    # At boot.

    def _add_boot_disk(self, each: BootDisk, pool: Pool) -> None:
        attached = AttachedDisk(
            each.disk,
            each.identifiers,
            each.place,
            pool,
            each.serial,
            [*each.images],
            limits=each.disk.limits,
            is_boot=each.is_boot,
            state=State.ATTACHED,
        )
        attached.done = [step.name for step in attached.plan()]
        for image in (each for top in attached.images for each in top.chain):
            image.done = image_nodes.plan(image)
            self._context.register.numbers_used_up_to(image.number)
        self._context.register.numbers_used_up_to(attached.identifiers.number)
        attached.settled.set()
        self._context.register.add(attached)

    async def empty_drives(self) -> None:
        """Remove the blank media from a copy's empty optical drives, before the copy loads its state."""
        for attached in self:
            if not attached.images and attached.disk.bus == "scsi-cd":
                await media.empty(self._context, attached)

    async def release_boot_descriptors(self) -> None:
        """Remove the boot disks' descriptor sets, which QEMU does not need after it has opened the nodes."""
        for attached in self:
            for image in attached.images:
                await images.release(self._hotplug, image)
        self._context.register.changed()

    async def reconcile(self, foreign_fdsets: Sequence[int]) -> list[str]:
        """Reconcile the disks of another manager's journal with QEMU; returns messages for the log.

        `foreign_fdsets` are descriptor sets that the user gave to QEMU. Raises Timeout or NotConnected.
        """
        # Most managers adopt no machine, and do not load this.
        from .recovery import Adoption

        work = Adoption(self._context)
        await work.run(foreign_fdsets)
        return work.notes

    # Attaching.

    async def attach(self, disk: Disk, backing: Backing | None, *, guest_timeout: float | None = None) -> AttachedDisk:
        """Attach a disk whose image is open; returns when QEMU has plugged in the device.

        With `guest_timeout`, returns when the guest has started to use the disk, or raises Timeout after that many
        seconds; the disk then stays attached. Takes ownership of `backing`; an optical drive may have none. Raises
        StorageExists, BadConfig, ConfigNotSupported, NoFreePort, QmpError, SystemFailure, Timeout or NotConnected, and
        leaves nothing behind. After a cancellation, a task of the machine undoes the attach.
        """
        try:
            if guest_timeout is not None:
                guest_driver.check_can_tell(disk)
            attached = await self._attach(disk, backing)
        finally:
            if backing is not None:
                backing.close()
        if guest_timeout is not None:
            await guest_driver.wait_taken(self._context, attached, guest_timeout)
        return attached

    async def wait_taken(self, name: str, timeout: float) -> None:
        """Wait until the guest uses a disk. Raises NoSuchStorage, ConfigNotSupported, Timeout or NotConnected."""
        attached = self._context.find(name)
        guest_driver.check_can_tell(attached.disk)
        await guest_driver.wait_taken(self._context, attached, timeout)

    async def _attach(self, disk: Disk, backing: Backing | None) -> AttachedDisk:
        """Attach a disk. Leaves `backing` open.

        Tries again if a QMP client has put a device at the chosen place, or has removed the place's controller: QEMU
        reports the removal some milliseconds after the controller's bus is gone.
        """
        while True:
            # An attach that fails closes its descriptor; the next attempt needs another.
            copy = backing and backing.copy()
            try:
                attached = await self._admit(disk, copy)
            except BaseException:
                if copy is not None:
                    copy.close()
                raise
            try:
                return await self._plug_in(attached)
            except QmpError:
                await self.look_at_places()
                is_foreign = attached.pool.is_foreign(attached.place)
                if not is_foreign and self._context.controllers.is_there(attached.place):
                    raise

    async def _plug_in(self, attached: AttachedDisk) -> AttachedDisk:
        image = attached.image

        async def empty() -> None:
            await media.empty(self._context, attached)

        try:
            await self._hotplug.attach(attached, empty if image is None else None)
        except VmspawnError as error:
            raise await explain(error, attached.name, image, self._hotplug.journal.machine) from None
        return attached

    async def look_at_places(self) -> None:
        """Update the record of ports and slots that QMP clients have occupied or freed.

        Does nothing if QEMU does not answer.
        """
        layout = self._context.layout
        with contextlib.suppress(QmpError, Timeout, NotConnected):
            places = await occupied_places(self._hotplug.monitor, layout, timeout=_LOOK_TIMEOUT)
            layout.pci.note_occupied(places)

    async def _admit(self, disk: Disk, backing: Backing | None) -> AttachedDisk:
        context, layout, controllers = self._context, self._context.layout, self._context.controllers
        is_threaded = disk.thread and disk.bus == "virtio-scsi"
        what = disk.path or disk.name
        image_format = formats.DEFAULT_FORMAT
        if backing is not None:
            image_format = await images.choose_format(backing, disk.format, what=what)
        disk, serial, image, place = admission.admit(
            disk,
            backing,
            image_format,
            context.register,
            number=context.register.fresh_number(),
            layout=layout,
            pci=layout.pci,
            scsi=controllers.targets if is_threaded else layout.scsi,
            what=what,
        )
        pool = controllers.pool_of(disk.bus, place)
        try:
            if not controllers.is_there(place):
                await controllers.plug_in(disk, place)
                admission.check_beside(context.register, disk, serial, backing)
        except BaseException:
            pool.release(place)
            raise
        identifiers = Identifiers(context.register.fresh_number())
        found = [] if image is None else [image]
        return AttachedDisk(disk, identifiers, place, pool, serial, found, limits=disk.limits)

    # Detaching.

    async def detach(self, name: str, *, timeout: float = DETACH_TIMEOUT, force: bool = False) -> bool:
        """Detach a disk; returns True when its device, nodes and descriptors are removed, and its port is free.

        Raises NoSuchStorage, StorageImmutable for a boot disk, NotConnected, or StoragePending if the guest has not
        released the disk within `timeout` seconds. The removal then continues, and a later call waits for the same
        removal.

        `force` takes the image away first, so that the host can use the file; the guest gets I/O errors. Returns False,
        instead of raising StoragePending, if the device is still there after `timeout`. Raises StoragePending if a QMP
        client uses the image, so that QEMU could not close it.
        """
        attached = self._context.find(name)
        check_not_boot(attached, "detached")
        deadline = asyncio.get_running_loop().time() + timeout
        if not await self._hotplug.wait_settled(attached, deadline):
            raise StoragePending(f"{name} is still being attached", hint="try again")
        if force:
            await self._take_away(attached)
        if await self._hotplug.detach(attached, deadline):
            await self._context.controllers.wait_released(attached.place, _CONTROLLER_TIMEOUT)
            return True
        if force and not attached.has_open_image:
            return False
        raise StoragePending.with_fields(
            "{why} (waited {seconds} s)",
            hint=_PENDING_HINT if attached.has_device and not force else _USED_HINT,
            why=await self._why_image_is_open(attached) if force else self.why_pending(attached),
            seconds=f"{timeout:g}",
        )

    async def _why_image_is_open(self, attached: AttachedDisk) -> str:
        """Return the reason why QEMU has not closed an image that was taken away."""
        users = await block_graph.users_of(self._hotplug.monitor, attached)
        used = f": it is used by {users}" if users else ""
        return f"QEMU still has the image of {attached.name} open{used}"

    async def _take_away(self, attached: AttachedDisk) -> None:
        if attached.unwinding is not None and attached.has_device and not buses.TABLE[attached.disk.bus].is_guest_asked:
            # QEMU is about to remove the device. A node that was changed meanwhile would stay.
            return
        # The guest is asked to release the disk after the image is closed.
        self._hotplug.begin_removal(attached)

        async def work() -> None:
            async with self._hotplug.gate.together(), attached.lock:
                await displaced.check(self._context, attached)
                await swap.take_away(self._context, attached)

        try:
            await self._hotplug.tasks.run(
                work(), f"taking the image of {attached.name} away", timeout=CHANGE_TIMEOUT, hint=STORAGE_HINT
            )
        except VmspawnError as error:
            # The image stays, but the guest is asked to release the disk.
            self._hotplug.unwind(attached)
            raise await explain(error, attached.name, None, self._hotplug.journal.machine) from None

    def freeze(self) -> Freeze:
        """Return a freeze of the machine's writable disks, which puts overlays on their images."""
        return Freeze(self._context)

    # Views.

    async def views(self) -> dict[str, DiskView]:
        """Return the size, file and faults of each disk by name. Raises what `Monitor.execute` raises."""
        return disk_views.view(await BlockGraph.take(self._hotplug.monitor), self)

    async def statistics(self) -> dict[str, Statistics]:
        """Return each disk's I/O statistics by name, without disks that are being attached or detached."""
        return await statistics.read(self._context, self)

    def why_pending(self, attached: AttachedDisk) -> str:
        """Return the likely reason why a removal has not completed, or an empty string without a removal."""
        return pending.why(attached, self._hotplug.run_state) if attached.removal else ""

    # Events.

    def _event(self, event: Event) -> None:
        if event.name == "DEVICE_DELETED" and event.data and "device" in event.data:
            self._controller_gone(str(event.data["device"]))
        if event.name != failures.QEMU_EVENT:
            return
        attached = failures.attachment_of(event, self)
        if attached is not None:
            failure = failures.failure(event)
            attached.failures += 1
            attached.last_failure = str(failure)
            self._hotplug.publish(failures.FAILED_EVENT, attached, **failure.to_event())

    def _controller_gone(self, device: str) -> None:
        """Unplug the disks of a removed controller: QEMU keeps its namespaces (docs/qemu.md, "NVMe")."""
        for attached in self:
            if controller_of(attached.place) == device and attached.state is State.ATTACHED:
                self._hotplug.unwind(attached)

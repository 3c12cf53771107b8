# SPDX-License-Identifier: LGPL-2.1-or-later
"""Adopts the disks of a manager that died.

A change that was under way is kept if QEMU has made it, and undone otherwise. Nodes, objects and descriptor sets that
no disk of the journal owns are removed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import QmpError, Timeout, VmspawnError
from ..hotplug import recovery
from ..hotplug.attachment import State
from ..hotplug.places import controller_of
from ..hotplug.qemu_objects import FDSET, OBJECT, QemuObject
from . import buses, displaced, failures, image_nodes, images, inactive_images, media, swap
from .attached_disk import AttachedDisk
from .block_graph import BlockGraph
from .context import Context
from .image import FAULT, FDSET_BASE
from .image_nodes import NODE
from .inventory import Inventory, uses_fdset
from .limits import Limits
from .resize import follow_image
from .steps import PIVOT

# vmspawn's names in QEMU, including the long names of older versions. The patterns of nodes are in order, from the top
# down. Parts with these names that belong to no disk of the journal are leftovers.
_NODES = tuple(map(re.compile, (r"drive\d+(-pivot)?", r"image\d+-format", r"image\d+(-file)?")))
_OBJECT = re.compile(r"limits\d+|drive\d+-(limits|thread)")


class Adoption:
    """The adoption of a machine's disks. `notes` are messages for the log about faults and repairs."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._hotplug = context.hotplug
        self.notes: list[str] = []

    async def run(self, foreign_fdsets: Sequence[int]) -> None:
        """Adopt the disks. `foreign_fdsets` are sets that the user passed to QEMU. Raises Timeout, NotConnected."""
        disks = tuple(self._context.register)
        found = await Inventory.take(self._context.monitor)
        leftovers = _leftovers(found, disks)

        async def settle_attached(disk: AttachedDisk) -> None:
            await self._attempt(disk, self._settle_change(disk, found))

        async def settle_detaching(disk: AttachedDisk) -> None:
            await self._attempt(disk, self._finish_force(disk, found))

        await self._context.controllers.settle(found.devices, self.notes.append)
        await recovery.settle(
            self._hotplug,
            disks,
            found.devices,
            self.notes.append,
            settle_attached=settle_attached,
            settle_detaching=settle_detaching,
        )
        self._settle_controllers(found, disks)
        await self._remove_leftovers(leftovers)
        await self._drop_fdsets(found, disks, foreign_fdsets)
        self._context.register.save()

    def _settle_controllers(self, found: Inventory, disks: Iterable[AttachedDisk]) -> None:
        """Unplug namespaces whose controller is gone, because QEMU keeps them, and a controller without namespaces."""
        for each in disks:
            if each.state is State.ATTACHED and controller_of(each.place) not in (None, *found.devices):
                self.notes.append(f"the controller of {each.name} was removed meanwhile; the disk is removed as well")
                self._hotplug.unwind(each)
        self._context.controllers.release_unused()

    async def _attempt(self, attachment: AttachedDisk, work: Any) -> None:
        """Await `work`; note a refusal by QEMU, for example because a QMP client uses a node. The disk still works."""
        try:
            async with attachment.lock:
                await work
        except QmpError as error:
            self.notes.append(f"could not tidy up {attachment.name}: {error}")

    # Changes that were under way.

    async def _settle_change(self, attachment: AttachedDisk, found: Inventory) -> None:
        if attachment.disk.bus == "scsi-cd":
            await self._settle_medium(attachment, found)
        elif len(attachment.images) > 1:
            await self._settle_images(attachment, found)
        await self._notice_displacement(attachment)
        await self._read_limits(attachment, found)
        attachment.last_failure = failures.STOPPED.get(found.io_status.get(attachment.device, "ok"), "")
        for image in attachment.images:
            await images.release(self._hotplug, image)

    async def _settle_images(self, attachment: AttachedDisk, found: Inventory) -> None:
        """Settle an interrupted replacement of the image: keep the image that the guest uses, and close the others."""
        image = found.image_under(attachment)
        if image is None:
            self.notes.append(f"cannot tell which image {attachment.name} uses; detach the disk when possible")
            return
        self.notes.append(f"{attachment.name} was getting another image; it uses {image.path or 'one of the two'}")
        attachment.images.remove(image)
        attachment.images.insert(0, image)
        for other in attachment.images[1:]:
            # If one of the two is an overlay of the other, the base stays open: the guest uses the overlay, which needs
            # the base, or the base itself.
            if image.base is not None and image.base.number == other.number:
                attachment.images.remove(other)
            elif other.base is not None and other.base.number == image.number:
                other.base = None
        self._context.register.save()
        for other in attachment.images[1:]:
            await images.close_when_unused(self._hotplug, attachment, other)
        if not buses.TABLE[attachment.disk.bus].is_resizable or attachment.read_only:
            return
        if await inactive_images.are_inactive(self._context):
            self.notes.append(f"{attachment.name} may have another size than its image; resize it once the guest runs")
        else:
            await follow_image(self._context, attachment)

    async def _notice_displacement(self, attachment: AttachedDisk) -> None:
        graph = await BlockGraph.take(self._context.monitor)
        if (node := displaced.displacing(graph, attachment)) is not None:
            self.notes.append(displaced.describe(graph, attachment, node))

    async def _read_limits(self, attachment: AttachedDisk, found: Inventory) -> None:
        """Read the disk's limits from QEMU: the last change may not be in the journal."""
        group = attachment.identifiers.limits
        if group in found.objects:
            arguments = {"path": f"/objects/{group}", "property": "limits"}
            attachment.limits = Limits.from_qemu(await self._context.monitor.execute("qom-get", arguments))

    async def _settle_medium(self, attachment: AttachedDisk, found: Inventory) -> None:
        """Settle an interrupted change of the medium: keep an inserted medium, and close the images of others."""
        inserted, is_tray_open = found.medium(attachment)
        if inserted != attachment.identifiers.pivot:
            await media.forget(self._context, attachment)
        elif len(attachment.images) > 1:
            for other in attachment.images[1:]:
                await images.dismantle(self._hotplug, attachment, other)
            if is_tray_open:
                await self._context.monitor.execute("blockdev-close-tray", {"id": attachment.identifiers.device})

    async def _finish_force(self, attachment: AttachedDisk, found: Inventory) -> None:
        """Finish an interrupted forced detach: replace the image by one that fails every request; close the old one."""
        faults = [image for image in attachment.images if image.format == FAULT]
        if not faults or PIVOT not in attachment.done:
            return
        if found.image_under(attachment) is faults[0]:
            attachment.images.remove(faults[0])
            attachment.images.insert(0, faults[0])
            for other in attachment.images[1:]:
                await images.close_when_unused(self._hotplug, attachment, other)
        else:
            await images.dismantle(self._hotplug, attachment, faults[0])
            await swap.take_away(self._context, attachment)

    # The removal of leftovers.

    async def _remove(self, part: QemuObject, what: str) -> None:
        try:
            await self._hotplug.remove(part)
        except (QmpError, Timeout) as error:
            self.notes.append(f"could not remove the leftover {what}: {error}")

    async def _remove_leftovers(self, leftovers: Sequence[QemuObject]) -> None:
        """Remove leftovers. Ignores refusals if no leftover has a user: QEMU 7.2 may keep a node (`refusals.py`)."""
        refused: list[tuple[QemuObject, VmspawnError]] = []
        for each in leftovers:
            try:
                await self._hotplug.remove(each)
            except (QmpError, Timeout) as error:
                refused.append((each, error))
        if not refused:
            return
        graph = await BlockGraph.take(self._context.monitor)
        if graph.users({str(each.name) for each in leftovers}):
            self.notes += (f"could not remove the leftover {each.name}: {error}" for each, error in refused)

    async def _drop_fdsets(self, found: Inventory, attachments: Iterable[AttachedDisk], foreign: Sequence[int]) -> None:
        """Remove descriptor sets, except foreign ones, those in a disk's journal, and those that clients use."""
        kept = {
            image.fdset
            for each in attachments
            for top in each.images
            for image in top.chain
            if image_nodes.FDSET in image.done
        } | {*foreign}
        for number in sorted(found.fdsets - kept):
            if number < FDSET_BASE and any(uses_fdset(text, number) for text in found.nodes.values()):
                continue
            await self._remove(QemuObject(FDSET, number), f"descriptor set {number}")


def _leftovers(found: Inventory, attachments: Iterable[AttachedDisk]) -> list[QemuObject]:
    """Return the leftover nodes, from the top down, and the leftover objects."""
    owned = {name for attachment in attachments for name in names_of(attachment)}
    nodes = [name for layer in _NODES for name in found.nodes if layer.fullmatch(name) and name not in owned]
    objects = [name for name in found.objects if _OBJECT.fullmatch(name) and name not in owned]
    return [QemuObject(NODE, name) for name in nodes] + [QemuObject(OBJECT, name) for name in objects]


def names_of(attachment: AttachedDisk) -> Iterable[str]:
    """Yield the names of a disk's nodes and objects in QEMU."""
    identifiers = attachment.identifiers
    yield from (identifiers.pivot, identifiers.limits, identifiers.thread)
    for image in (each for top in attachment.images for each in top.chain):
        yield from (image.file_node, image.format_node)

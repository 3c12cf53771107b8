# SPDX-License-Identifier: LGPL-2.1-or-later
"""Taking over the disks of a manager that died: what its journal says, held against what QEMU has.

A detach that was under way goes on; an attach or a change stays if QEMU had made it and is taken back if not. Whoever
asked for it was never answered, so either is the truth. Disks whose devices went meanwhile are taken apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..errors import QmpError, Timeout
from ..hotplug import places
from ..hotplug.places import PciPlace
from . import buses, image_nodes, media, swap
from .attached_disk import AttachedDisk, State
from .context import Context
from .image import FAULT, FDSET_BASE
from .inventory import Inventory, uses_fdset
from .iothread_controller import CONTROLLER_THREAD
from .limits import Limits
from .qemu_objects import Part
from .resize import follow_image
from .saved import load_pci_place
from .steps import AddPivot, ReservePlace

# Our own names in QEMU, today's and the long ones. Those of a disk that the journal does not know are left over; nodes
# from the top down.
_NODES = tuple(map(re.compile, (r"drive\d+(-pivot)?", r"image\d+-format", r"image\d+(-file)?")))
_OBJECT = re.compile(r"limits\d+|drive\d+-(limits|thread)")


def load(context: Context, saved: dict[str, Any]) -> list[AttachedDisk]:
    """The disks in a saved register, with their places taken. Raises KeyError, TypeError or ValueError."""
    context.numbers_used_up_to(int(saved["next"]) - 1)
    if place := saved.get("threaded-scsi"):
        context.threaded_place = load_pci_place(place)
        context.threaded_scsi = places.scsi_pool(places.THREADED_SCSI_CONTROLLER)
        context.layout.pci.claim(context.threaded_place)
    attachments = [AttachedDisk.from_state(each) for each in saved["attachments"]]
    if any(each.place.bus == f"{places.THREADED_SCSI_CONTROLLER}.0" for each in attachments):
        context.threaded_scsi = context.threaded_scsi or places.scsi_pool(places.THREADED_SCSI_CONTROLLER)
    for attachment in attachments:
        attachment.settled.set()
        if ReservePlace.name in attachment.done:
            context.pool(attachment).claim(attachment.place)
    return attachments


class Adoption:
    """One taking over. `unwind` starts to take a disk apart; `notes` says, in words, what was found and done."""

    def __init__(self, context: Context, unwind: Callable[[AttachedDisk], object]) -> None:
        self._context = context
        self._unwind = unwind
        self.notes: list[str] = []

    async def run(self, attachments: Iterable[AttachedDisk], foreign_fdsets: Sequence[int]) -> None:
        """Do it. `foreign_fdsets` were there from boot and are not ours. Raises Timeout or NotConnected."""
        attachments = tuple(attachments)
        found = await Inventory.take(self._context.monitor)
        leftovers = _leftovers(found, attachments)
        await self._settle_controller(found)
        for attachment in attachments:
            await self._settle(attachment, found)
        for part in leftovers:
            await self._remove(part, str(part.name))
        await self._drop_fdsets(found, attachments, foreign_fdsets)
        self._context.journal()

    async def _settle(self, attachment: AttachedDisk, found: Inventory) -> None:
        if not found.has_device(attachment):
            attachment.gone.set()
        elif attachment.state is State.ATTACHING and attachment.images:
            # The device is the last that comes, and the journal does not speak of it again.
            attachment.state = State.ATTACHED
        match attachment.state:
            case State.ATTACHING:
                self.notes.append(f"{attachment.name} has no device in QEMU; what is left of it is removed")
                self._unwind(attachment)
            case State.DETACHING:
                self.notes.append(f"goes on detaching {attachment.name}")
                await self._attempt(attachment, self._finish_force(attachment, found))
                self._unwind(attachment)
            case State.ATTACHED if attachment.gone.is_set():
                self.notes.append(f"{attachment.name} was removed meanwhile")
                self._unwind(attachment)
            case State.ATTACHED:
                await self._attempt(attachment, self._settle_change(attachment, found))

    async def _attempt(self, attachment: AttachedDisk, work: Any) -> None:
        """Something that QEMU may refuse, for instance because somebody else uses a node. The disk works then too."""
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
        await self._read_limits(attachment, found)
        for image in attachment.images:
            await image_nodes.release(self._context, image)

    async def _settle_images(self, attachment: AttachedDisk, found: Inventory) -> None:
        """An image was being replaced. The one that the guest works on stays."""
        image = found.image_under(attachment)
        if image is None:
            self.notes.append(f"cannot tell which image {attachment.name} stands on; detach it when you can")
            return
        self.notes.append(f"{attachment.name} was getting another image; it stands on {image.path or 'the one'}")
        attachment.images.remove(image)
        attachment.images.insert(0, image)
        self._context.journal()
        for other in attachment.images[1:]:
            await image_nodes.dismantle(self._context, attachment, other)
        if buses.TABLE[attachment.disk.bus].resizable and not attachment.read_only:
            await follow_image(self._context, attachment)

    async def _read_limits(self, attachment: AttachedDisk, found: Inventory) -> None:
        """The limits are those that QEMU keeps, whoever set them last."""
        group = attachment.identifiers.limits
        if group in found.objects:
            arguments = {"path": f"/objects/{group}", "property": "limits"}
            attachment.limits = Limits.from_qemu(await self._context.monitor.execute("qom-get", arguments))

    async def _settle_medium(self, attachment: AttachedDisk, found: Inventory) -> None:
        """A medium that is in stays in, and another one that was to come does not. Where none is in, there is none."""
        inserted, tray_open = found.medium(attachment)
        if inserted != attachment.identifiers.pivot:
            await media.forget(self._context, attachment)
        elif len(attachment.images) > 1:
            for other in attachment.images[1:]:
                await image_nodes.dismantle(self._context, attachment, other)
            if tray_open:
                await self._context.monitor.execute("blockdev-close-tray", {"id": attachment.identifiers.device})

    async def _finish_force(self, attachment: AttachedDisk, found: Inventory) -> None:
        """Whoever detached by force wants the image back, whatever the guest does."""
        faults = [image for image in attachment.images if image.format == FAULT]
        if not faults or AddPivot.name not in attachment.done:
            return
        if found.image_under(attachment) is faults[0]:
            attachment.images.remove(faults[0])
            attachment.images.insert(0, faults[0])
            for other in attachment.images[1:]:
                await image_nodes.dismantle(self._context, attachment, other)
        else:
            await image_nodes.dismantle(self._context, attachment, faults[0])
            await swap.take_away(self._context, attachment)

    # What is left over.

    async def _settle_controller(self, found: Inventory) -> None:
        """The controller with an I/O thread is there or not, whatever was under way."""
        place = self._context.threaded_place
        if places.THREADED_SCSI_CONTROLLER in found.devices:
            if place is None:
                await self._find_controller()
            return
        if place is None:
            return
        self._context.threaded_place = None
        self._context.layout.pci.release(place)
        await self._context.remove(Part("object", CONTROLLER_THREAD))

    async def _find_controller(self) -> None:
        """A state of version 1 does not say where it is; QEMU does."""
        device = f"/machine/peripheral/{places.THREADED_SCSI_CONTROLLER}"
        bus = await self._context.monitor.execute("qom-get", {"path": device, "property": "parent_bus"})
        address = await self._context.monitor.execute("qom-get", {"path": device, "property": "addr"})
        where = PciPlace(str(bus).rpartition("/")[2], hex(int(address) >> 3))
        self._context.threaded_place = where
        self._context.threaded_scsi = self._context.threaded_scsi or places.scsi_pool(places.THREADED_SCSI_CONTROLLER)
        self._context.layout.pci.claim(where)

    async def _remove(self, part: Part, what: str) -> None:
        try:
            await self._context.remove(part)
        except (QmpError, Timeout) as error:
            self.notes.append(f"could not remove {what}, which was left over: {error}")

    async def _drop_fdsets(self, found: Inventory, attachments: Iterable[AttachedDisk], foreign: Sequence[int]) -> None:
        """Nothing needs a descriptor set by now, but for nodes that others opened, and what is being unwound."""
        kept = {image.fdset for each in attachments for image in each.images if image_nodes.FDSET in image.done} | {
            *foreign
        }
        for number in sorted(found.fdsets - kept):
            if number < FDSET_BASE and any(uses_fdset(text, number) for text in found.nodes.values()):
                continue
            await self._remove(Part("fdset", number), f"descriptor set {number}")


def _leftovers(found: Inventory, attachments: Iterable[AttachedDisk]) -> list[Part]:
    """Nodes, from the top down, and objects with names of ours that belong to no disk of the journal."""
    owned = {name for attachment in attachments for name in _names(attachment)}
    nodes = [name for layer in _NODES for name in found.nodes if layer.fullmatch(name) and name not in owned]
    objects = [name for name in found.objects if _OBJECT.fullmatch(name) and name not in owned]
    return [Part("node", name) for name in nodes] + [Part("object", name) for name in objects]


def _names(attachment: AttachedDisk) -> Iterable[str]:
    identifiers = attachment.identifiers
    yield from (identifiers.pivot, identifiers.limits, identifiers.thread)
    for image in attachment.images:
        yield from (image.file_node, image.format_node)

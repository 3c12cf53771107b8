# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a disk must be before anything is done for it, and the choice of all that undoing will need."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import BadConfig, ConfigNotSupported, StorageExists
from ..hotplug.places import NO_NAMESPACES, NO_NAMESPACES_HINT, Place
from . import backing as backings
from . import buses, formats
from . import disk as disks
from .attached_disk import AttachedDisk, State
from .backing import Backing
from .context import Context
from .disk import AUTO_BUS, Disk
from .image import Image
from .limits import check_limits
from .nodes import Identifiers


def admit(context: Context, others: Iterable[AttachedDisk], disk: Disk, backing: Backing | None) -> AttachedDisk:
    """Check a disk that is to be attached beside the others, and reserve its place.

    `backing` stays the caller's when this fails, and is the attachment's when it succeeds; None makes an optical drive
    without a medium. Raises StorageExists, BadConfig, ConfigNotSupported or NoFreePort.
    """
    disk = _resolve_bus(context, disk)
    disks.check_name(disk.name)
    disks.check_bus(disk.bus)
    disks.check_options(disk)
    check_limits(disk.limits)
    others = tuple(others)
    for other in others:
        if other.name == disk.name:
            raise StorageExists(f"a disk named {disk.name} exists already", hint=_exists_hint(other))
    serial = _choose_serial(disk)
    image = None
    if backing is not None:
        image = make_image(context, disk, backing, disk.format, disk.path or disk.name)
        check_not_attached(others, backing, share=disk.share)
    elif disk.bus != "scsi-cd":
        raise BadConfig(f"{disk.name} has no image", hint="only a scsi-cd can be without")
    read_only = disk.read_only or not buses.TABLE[disk.bus].writable or (backing is not None and not backing.writable)
    place = _take_place(context, disk)
    identifiers = Identifiers(context.fresh_number())
    images = [] if image is None else [image]
    disk = disk._replace(read_only=read_only)
    return AttachedDisk(disk, identifiers, place, serial, images, limits=disk.limits)


def _resolve_bus(context: Context, disk: Disk) -> Disk:
    if disk.bus != AUTO_BUS:
        return disk
    return disk._replace(bus="virtio-blk" if context.layout.pci.free else "virtio-scsi")


def _exists_hint(other: AttachedDisk) -> str:
    if other.state is State.DETACHING:
        return "its removal is pending; the name is free once the guest has let go"
    return "choose another name, or detach it first"


def _choose_serial(disk: Disk) -> str:
    if disk.bus == "nvme-ns":
        if disk.serial:
            raise BadConfig("a namespace has no serial number but its controller's", hint="leave the serial out")
        return buses.NAMESPACE_SERIAL
    return disks.check_serial(disk.serial) if disk.serial else disks.serial_for(disk.name)


def make_image(context: Context, disk: Disk, backing: Backing, image_format: str | None, what: str) -> Image:
    """The image that a descriptor is for a disk, if it can be one. `backing` stays the caller's when this fails."""
    chosen = formats.choose_format(backing, image_format, what=what)
    if not buses.TABLE[disk.bus].writable and backing.writable:
        raise ConfigNotSupported(f"bus {disk.bus} is read-only", hint="open the image read-only")
    if not backing.size and buses.TABLE[disk.bus].writable:
        raise BadConfig(f"{what} is empty", hint="make an image with: qemu-img create IMAGE SIZE")
    if disk.share and chosen != "raw":
        raise BadConfig(f"an image in {chosen} format cannot be shared", hint="share raw images only")
    backings.set_direct(backing, disk.cache == "none", what=what)
    return Image(context.fresh_number(), backing, chosen, disk.path)


def check_not_attached(others: Iterable[AttachedDisk], backing: Backing, *, share: bool) -> None:
    """QEMU's image lock does not see one open file that is passed twice, so look ourselves. Raises StorageExists."""
    for other in others:
        for image in other.images:
            if image.backing is None or image.backing.identity != backing.identity:
                continue
            if (image.backing.writable or backing.writable) and not (share and other.disk.share):
                raise StorageExists(
                    f"this file is attached already, as {other.name}",
                    hint="attach it read-only in both places, or attach a copy",
                )


def _take_place(context: Context, disk: Disk) -> Place:
    match disk.bus:
        case "nvme-ns":
            if not context.layout.namespaces.places:
                raise ConfigNotSupported(NO_NAMESPACES, hint=NO_NAMESPACES_HINT)
            return context.layout.namespaces.take_for(disk.name)
        case "virtio-scsi" if disk.thread:
            assert context.threaded_scsi is not None
            return context.threaded_scsi.take()
        case "virtio-scsi" | "scsi-cd":
            return context.layout.scsi.take()
        case _:
            return context.layout.pci.take()

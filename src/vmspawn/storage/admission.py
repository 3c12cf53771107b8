# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a drive must be before anything is done for it, and the choice of all that undoing will need."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import BadConfig, ConfigNotSupported, StorageExists
from ..hotplug.places import NO_NAMESPACES, NO_NAMESPACES_HINT, Place
from . import backing as backings
from . import buses, formats
from . import disk as drives
from .attached_disk import Attachment, State
from .backing import Backing
from .context import Context
from .disk import AUTO_BUS, Drive
from .image import Image
from .limits import check_limits
from .nodes import Identifiers


def admit(context: Context, others: Iterable[Attachment], drive: Drive, backing: Backing | None) -> Attachment:
    """Check a drive that is to be attached beside the others, and reserve its place.

    `backing` stays the caller's when this fails, and is the attachment's when it succeeds; None makes an optical drive
    without a medium. Raises StorageExists, BadConfig, ConfigNotSupported or NoFreePort.
    """
    drive = _resolve_bus(context, drive)
    drives.check_name(drive.name)
    drives.check_bus(drive.bus)
    drives.check_options(drive)
    check_limits(drive.limits)
    others = tuple(others)
    for other in others:
        if other.name == drive.name:
            raise StorageExists(f"a drive named {drive.name} exists already", hint=_exists_hint(other))
    serial = _choose_serial(drive)
    image = None
    if backing is not None:
        image = make_image(context, drive, backing, drive.format, drive.path or drive.name)
        check_not_attached(others, backing, share=drive.share)
    elif drive.bus != "scsi-cd":
        raise BadConfig(f"{drive.name} has no image", hint="only a scsi-cd can be without")
    read_only = drive.read_only or not buses.TABLE[drive.bus].writable or (backing is not None and not backing.writable)
    place = _take_place(context, drive)
    identifiers = Identifiers(context.fresh_number())
    images = [] if image is None else [image]
    drive = drive._replace(read_only=read_only)
    return Attachment(drive, identifiers, place, serial, images, limits=drive.limits)


def _resolve_bus(context: Context, drive: Drive) -> Drive:
    if drive.bus != AUTO_BUS:
        return drive
    return drive._replace(bus="virtio-blk" if context.layout.pci.free else "virtio-scsi")


def _exists_hint(other: Attachment) -> str:
    if other.state is State.DETACHING:
        return "its removal is pending; the name is free once the guest has let go"
    return "choose another name, or detach it first"


def _choose_serial(drive: Drive) -> str:
    if drive.bus == "nvme-ns":
        if drive.serial:
            raise BadConfig("a namespace has no serial number but its controller's", hint="leave the serial out")
        return buses.NAMESPACE_SERIAL
    return drives.check_serial(drive.serial) if drive.serial else drives.serial_for(drive.name)


def make_image(context: Context, drive: Drive, backing: Backing, image_format: str | None, what: str) -> Image:
    """The image that a descriptor is for a drive, if it can be one. `backing` stays the caller's when this fails."""
    chosen = formats.choose_format(backing, image_format, what=what)
    if not buses.TABLE[drive.bus].writable and backing.writable:
        raise ConfigNotSupported(f"bus {drive.bus} is read-only", hint="open the image read-only")
    if not backing.size and buses.TABLE[drive.bus].writable:
        raise BadConfig(f"{what} is empty", hint="make an image with: qemu-img create IMAGE SIZE")
    if drive.share and chosen != "raw":
        raise BadConfig(f"an image in {chosen} format cannot be shared", hint="share raw images only")
    backings.set_direct(backing, drive.cache == "none", what=what)
    return Image(context.fresh_number(), backing, chosen, drive.path)


def check_not_attached(others: Iterable[Attachment], backing: Backing, *, share: bool) -> None:
    """QEMU's image lock does not see one open file that is passed twice, so look ourselves. Raises StorageExists."""
    for other in others:
        for image in other.images:
            if image.backing is None or image.backing.identity != backing.identity:
                continue
            if (image.backing.writable or backing.writable) and not (share and other.drive.share):
                raise StorageExists(
                    f"this file is attached already, as {other.name}",
                    hint="attach it read-only in both places, or attach a copy",
                )


def _take_place(context: Context, drive: Drive) -> Place:
    match drive.bus:
        case "nvme-ns":
            if not context.layout.namespaces.places:
                raise ConfigNotSupported(NO_NAMESPACES, hint=NO_NAMESPACES_HINT)
            return context.layout.namespaces.take_for(drive.name)
        case "virtio-scsi" if drive.thread:
            assert context.threaded_scsi is not None
            return context.threaded_scsi.take()
        case "virtio-scsi" | "scsi-cd":
            return context.layout.scsi.take()
        case _:
            return context.layout.pci.take()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Admits disks by one set of rules, for boot disks and hot-plugged disks alike.

A disk is admitted in five steps:

1. `check_disk` checks the options that the user requested.
2. `check_name_is_free` compares the name with those of the machine's other disks.
3. `make_image` checks the image. It does not read the image, because that could block; the caller has called
`formats.choose_format`, which reads the image.
4. `check_not_attached` and the checks of serial number and boot index compare the disk with the other disks.
5. `take_place` reserves a place.

Only the last step acquires something, so that a refusal in an earlier step leaves nothing to undo.

This module is on the start path and imports next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from ..errors import BadConfig, ConfigNotSupported, StorageExists
from ..hotplug.places import NO_NAMESPACES, NO_NAMESPACES_HINT, Layout, Place, Pool
from ..record import Record
from . import buses, formats
from .backing import Backing, set_direct
from .disk import AUTO_BUS, Disk, check_bus, check_disk_name, check_disk_options, check_serial, serial_for
from .image import Image
from .limits import check_limits


class Neighbour(Protocol):
    """A disk that the machine has already."""

    @property
    def name(self) -> str:
        """The disk's name."""

    @property
    def disk(self) -> Disk:
        """The disk that the user requested."""

    @property
    def images(self) -> Sequence[Image]:
        """The disk's images."""

    @property
    def by_id(self) -> str:
        """The disk's stable path in the guest."""

    @property
    def is_leaving(self) -> bool:
        """True while the disk is being detached."""


_Neighbour = TypeVar("_Neighbour", bound=Neighbour)


class Admitted(Record):
    """An admitted disk with its reserved place. `image` is None for an empty optical drive."""

    disk: Disk
    serial: str
    image: Image | None
    place: Place


def check_disk(disk: Disk) -> Disk:
    """Return the disk if its options are valid, whatever its image is. Raises BadConfig if they are not."""
    check_disk_name(disk.name)
    if disk.bus != AUTO_BUS:
        check_bus(disk.bus)
    check_disk_options(disk)
    check_limits(disk.limits)
    if disk.format is not None:
        formats.check_format(disk.format)
    _choose_serial(disk)
    return disk


def admit(
    disk: Disk,
    backing: Backing | None,
    image_format: str,
    neighbours: Iterable[_Neighbour],
    *,
    number: int,
    layout: Layout,
    pci: Pool,
    scsi: Pool,
    what: str,
) -> Admitted:
    """Admit a disk beside its neighbours, and reserve a place for it.

    `backing` is the open image, or None for an optical drive without a medium; the caller owns it if this fails.
    `image_format` is the result of `formats.choose_format`, `number` the new image's number. PCI devices get a place
    from `pci`, SCSI devices from `scsi`. `what` names the image in error messages. Raises BadConfig,
    ConfigNotSupported, StorageExists or NoFreePort.
    """
    disk = check_disk(_resolve_bus(disk, pci))
    neighbours = tuple(neighbours)
    check_name_is_free(neighbours, disk.name)
    image = None
    if backing is not None:
        image = make_image(number, disk, backing, image_format, what)
        check_not_attached(neighbours, backing, share=disk.share)
    elif disk.bus != "scsi-cd":
        raise BadConfig(f"{disk.name} has no image", hint="name an image; only a scsi-cd can be empty")
    is_written = buses.TABLE[disk.bus].is_writable and (backing is None or backing.is_writable)
    disk = disk._replace(read_only=disk.read_only or not is_written)
    serial = _choose_serial(disk)
    _check_serial_is_free(neighbours, disk, serial)
    _check_boot_index_is_free(neighbours, disk)
    _check_serial_of_controller(disk, serial, layout)
    return Admitted(disk, serial, image, take_place(disk, layout, pci, scsi))


def _resolve_bus(disk: Disk, pci: Pool) -> Disk:
    if disk.bus != AUTO_BUS:
        return disk
    return disk._replace(bus="virtio-blk" if pci.free else "virtio-scsi")


def _choose_serial(disk: Disk) -> str:
    if disk.bus == "nvme-ns":
        if disk.serial:
            raise BadConfig("an NVMe namespace has no serial number of its own", hint="leave the serial out")
        return buses.NAMESPACE_SERIAL
    return check_serial(disk.serial) if disk.serial else serial_for(disk.name)


# The comparison with other disks.


def find_name(neighbours: Iterable[_Neighbour], name: str) -> _Neighbour | None:
    """Return the disk of that name, or None."""
    return next((each for each in neighbours if each.name == name), None)


def find_file(neighbours: Iterable[_Neighbour], backing: Backing, *, share: bool = False) -> _Neighbour | None:
    """Return a disk that uses the same file, unless both uses are read-only or both are shared; else None.

    QEMU's image lock does not detect a descriptor that is passed twice.
    """
    for each in neighbours:
        for image in (image for top in each.images for image in top.chain):
            if image.backing is None or image.backing.identity != backing.identity:
                continue
            if (image.backing.is_writable or backing.is_writable) and not (share and each.disk.share):
                return each
    return None


def check_name_is_free(neighbours: Iterable[_Neighbour], name: str) -> None:
    """Raise StorageExists if a disk has the name already."""
    if other := find_name(neighbours, name):
        leaving = "its removal is pending; the name is free when the guest has released the disk"
        hint = leaving if other.is_leaving else "choose another name, or detach it first"
        raise StorageExists(f"a disk named {name} exists already", hint=hint)


def check_not_attached(neighbours: Iterable[_Neighbour], backing: Backing, *, share: bool) -> None:
    """Raise StorageExists if a disk of this machine uses the file, unless both uses are read-only or shared."""
    if other := find_file(neighbours, backing, share=share):
        current = [image.backing for image in other.images[0].chain]
        if not any(each is not None and each.identity == backing.identity for each in current):
            raise StorageExists(
                f"QEMU still has this file open, as a former image of {other.name}",
                hint="it is closed when no QMP client uses it any more",
            )
        raise StorageExists(
            f"this file is attached already, as {other.name}",
            hint="attach it read-only in both places, or attach a copy",
        )


def check_beside(neighbours: Iterable[_Neighbour], disk: Disk, serial: str, backing: Backing | None) -> None:
    """Compare an admitted disk with the disks that were attached since. Raises StorageExists."""
    neighbours = tuple(neighbours)
    check_name_is_free(neighbours, disk.name)
    if backing is not None:
        check_not_attached(neighbours, backing, share=disk.share)
    _check_serial_is_free(neighbours, disk, serial)
    _check_boot_index_is_free(neighbours, disk)


def _check_boot_index_is_free(neighbours: Iterable[_Neighbour], disk: Disk) -> None:
    for other in neighbours:
        if disk.boot_index >= 0 and other.disk.boot_index == disk.boot_index:
            raise StorageExists(
                f"the disk {other.name} has boot index {disk.boot_index} already", hint="choose another boot index"
            )


def _check_serial_of_controller(disk: Disk, serial: str, layout: Layout) -> None:
    """Raise BadConfig for an NVMe disk with the serial number of the namespaces' controller: guests reject it."""
    if disk.bus == "nvme" and serial == buses.NAMESPACE_SERIAL and layout.namespaces.places:
        raise BadConfig(
            f"the serial number {serial} belongs to the controller of NVMe namespaces",
            hint="choose another serial number, or another name",
        )


def _check_serial_is_free(neighbours: Iterable[_Neighbour], disk: Disk, serial: str) -> None:
    """Raise StorageExists if another disk has the same path in the guest.

    A guest rejects an NVMe disk with the serial number of another. On the other buses, both disks would have one path.
    """
    if disk.bus == "nvme-ns":
        return
    for other in neighbours:
        if other.by_id == buses.by_id_path(disk.bus, serial):
            raise StorageExists(
                f"the disk {other.name} has the serial number {serial} already",
                hint="choose another serial number, or another name",
            )


# The checks of the image.


def make_image(number: int, disk: Disk, backing: Backing, image_format: str, what: str) -> Image:
    """Return a disk's image if the open file can be one. The caller owns `backing` if this fails.

    `what` names the image in error messages. Raises BadConfig or ConfigNotSupported.
    """
    if not buses.TABLE[disk.bus].is_writable and backing.is_writable:
        raise ConfigNotSupported(f"bus {disk.bus} is read-only", hint="open the image read-only")
    if not backing.size and buses.TABLE[disk.bus].is_writable:
        raise BadConfig(f"{what} is empty", hint="make an image with: qemu-img create IMAGE SIZE")
    if disk.share and image_format != "raw":
        raise BadConfig(f"an image in {image_format} format cannot be shared", hint="share raw images only")
    set_direct(backing, disk.cache == "none", what=what)
    return Image(number, backing, image_format, disk.path)


# The reservation of a place.


def take_place(disk: Disk, layout: Layout, pci: Pool, scsi: Pool) -> Place:
    """Reserve a place on the disk's bus. Raises NoFreePort or ConfigNotSupported."""
    match buses.TABLE[disk.bus].pool:
        case "namespaces":
            if not layout.namespaces.places:
                raise ConfigNotSupported(NO_NAMESPACES, hint=NO_NAMESPACES_HINT)
            return layout.namespaces.take_for(disk.name)
        case "scsi":
            return scsi.take()
        case _:
            return pci.take()

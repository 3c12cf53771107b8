# SPDX-License-Identifier: LGPL-2.1-or-later
"""The disks that are there from boot: opened by us, checked, grown or overlaid, and given their places."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import BadConfig, ConfigNotSupported, StartError, StorageExists, SystemFailure, UsageError, VmspawnError
from ..host import storageprovider
from ..host.storageprovider import Volume
from ..hotplug import places
from ..storage import backing as backings
from ..storage import buses, formats
from ..storage import disk as disks
from ..storage.backing import Backing
from ..storage.disk import DEFAULT_BUS, Disk, default_name
from ..storage.image import Image
from ..storage.nodes import Identifiers
from .commandline import BootDisk
from .overlay import BASE_NODE, grow, overlay

if TYPE_CHECKING:
    from .config import MachineConfig
    from .launch import Launched


def without_effect(config: MachineConfig) -> Iterator[str]:
    """A line for each option that the image's bus leaves nothing to do for."""
    if not config.image or config.image_disk_type != "scsi-cd":
        return
    given = {
        "--ephemeral": config.ephemeral,
        "--grow-image=": config.grow_image is not None,
        "--discard-disk=": not config.discard_disk,
    }
    for option in (option for option, wanted in given.items() if wanted):
        yield f"{option} has no effect with --image-disk-type=scsi-cd, which is only read"


def open_boot_disks(launched: Launched) -> None:
    """Open the image, the extra disks and the volumes, in the order in which the guest finds them.

    Raises StartError, UsageError, StorageExists; what was opened by then is `launched`'s to close.
    """
    config = launched.config
    wanted = [(disk, f"--extra-drive={disk.path}") for disk in config.extra_disks]
    if config.image:
        name = default_name(config.image)
        # A kernel that QEMU loads takes the first place itself.
        boot_index = -1 if config.linux or config.guest else 0
        image = Disk(config.image, name, config.image_disk_type, config.image_format, boot_index=boot_index)
        wanted.insert(0, (image, f"--image={config.image}"))
    discard = "unmap" if config.discard_disk else "ignore"
    for number, (disk, option) in enumerate(wanted):
        # NVMe disks tell the guest of errors, whatever is said for all.
        on_error = disk.on_error or (config.on_error if buses.TABLE[disk.bus].stops else "")
        disk = disk._replace(discard=discard, on_error=on_error)
        launched.boot_disks.append(_open_boot_disk(launched, number, disk, option))
    for volume in config.volumes:
        launched.boot_disks.append(_acquire_boot_disk(launched, len(launched.boot_disks), volume, discard))


def _acquire_boot_disk(launched: Launched, number: int, volume: Volume, discard: str) -> BootDisk:
    disk = Disk("", volume.disk_name, volume.config or DEFAULT_BUS, "raw", discard=discard)
    _check_disk_name(launched, disk)
    try:
        read_only = disk.bus == "scsi-cd"
        fd = storageprovider.acquire(volume, user=launched.config.registration.user, read_only=read_only)
        try:
            backing = backings.inspect(fd, what=volume.disk_name, read_only=read_only or None)
        except BaseException:
            os.close(fd)
            raise
    except (VmspawnError, OSError) as error:
        raise StartError(f"--bind-volume=: {error}", hint=getattr(error, "hint", "")) from None
    return _boot_disk(launched, number, disk, backing, f"--bind-volume={volume.disk_name}")


def _prepare_image(launched: Launched, backing: Backing, image_format: str, path: str) -> tuple[Backing, str]:
    """The image as it is to boot: grown, or below an overlay. Owns `backing`; the caller owns what is returned."""
    config = launched.config
    if config.ephemeral and launched.directory is not None:
        folder = launched.directory.path
        grow_to = config.grow_image
        return overlay(launched.additions, backing, image_format, path=path, folder=folder, grow_to=grow_to), "qcow2"
    if config.grow_image is not None:
        try:
            return grow(backing, image_format, config.grow_image, path=path), image_format
        except BaseException:
            backing.close()
            raise
    return backing, image_format


def _open_boot_disk(launched: Launched, number: int, disk: Disk, option: str) -> BootDisk:
    _check_disk_name(launched, disk)
    overlaid = launched.config.ephemeral and option.startswith("--image=")
    try:
        read_only = overlaid or disks.is_only_read(disk.bus, disk.format, read_only=disk.read_only)
        backing = backings.open_disk(disk.path, read_only=read_only)
    except (BadConfig, SystemFailure) as error:
        reason = str(error).removeprefix(f"cannot open {disk.path}: ")
        raise StartError(f"cannot use {option}: {reason}", hint=error.hint) from None
    return _boot_disk(launched, number, disk, backing, option)


def _check_disk_name(launched: Launched, disk: Disk) -> None:
    for other in launched.boot_disks:
        if other.disk.name == disk.name:
            raise UsageError(f"two disks are called {disk.name}", hint="give the files different names")


def _boot_disk(launched: Launched, number: int, disk: Disk, backing: Backing, option: str) -> BootDisk:
    """Make an open image a disk. Owns `backing` from the call on."""
    try:
        image_format = _boot_format(backing, disk, option)
        _check_once(launched, backing, option)
        backings.set_direct(backing, disk.cache == "none", what=disk.path)
        place = _boot_place(launched, disk)
    except BaseException:
        backing.close()
        raise
    is_image = option.startswith("--image=") and disk.bus != "scsi-cd"
    if is_image:
        backing, image_format = _prepare_image(launched, backing, image_format, disk.path)
    serial = disk.serial or disks.serial_for(disk.name)
    image = Image(number, backing, image_format, disk.path)
    disk = disk._replace(read_only=not backing.writable)
    return BootDisk(
        disk, Identifiers(number), place, image, serial, BASE_NODE if is_image and launched.config.ephemeral else None
    )


def _check_once(launched: Launched, backing: Backing, option: str) -> None:
    for other in launched.boot_disks:
        used = other.image.backing
        if used is not None and used.identity == backing.identity and (used.writable or backing.writable):
            raise StorageExists(f"{option} is the same file as another disk")


def _boot_format(backing: Backing, disk: Disk, option: str) -> str:
    if not backing.size and disk.bus != "scsi-cd":
        raise StartError(f"cannot use {option}: the image is empty", hint="make one with: qemu-img create IMAGE SIZE")
    try:
        return formats.choose_format(backing, disk.format, what=disk.path)
    except (BadConfig, ConfigNotSupported) as error:
        hint = error.hint.replace("say format ", "say --image-format=") if option.startswith("--image=") else error.hint
        raise StartError(f"cannot use {option}: {error}", hint=hint) from None


def _boot_place(launched: Launched, disk: Disk) -> places.Place:
    """SCSI disks go to the controller, the others to slots, which on `pc` the hot-plug pool must not hand out too."""
    layout = launched.layout
    if disk.bus in ("virtio-scsi", "scsi-cd"):
        return layout.scsi.take()
    if disk.bus == "nvme-ns":
        if not layout.namespaces.places:
            raise StartError(
                f"cannot use {disk.path} on nvme-ns: {places.NO_NAMESPACES}", hint=places.NO_NAMESPACES_HINT
            )
        return layout.namespaces.take_for(disk.name)
    place = layout.boot.take()
    layout.pci.claim(place)
    return place

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The drives that are there from boot: opened by us, checked, grown or overlaid, and given their places."""

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
from ..storage import disk as drives
from ..storage.backing import Backing
from ..storage.disk import DEFAULT_BUS, Drive, default_name
from ..storage.image import Image
from ..storage.nodes import Identifiers
from .commandline import BootDrive
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


def open_boot_drives(launched: Launched) -> None:
    """Open the image, the extra drives and the volumes, in the order in which the guest finds them.

    Raises StartError, UsageError, StorageExists; what was opened by then is `launched`'s to close.
    """
    config = launched.config
    wanted = [(drive, f"--extra-drive={drive.path}") for drive in config.extra_drives]
    if config.image:
        name = default_name(config.image)
        # A kernel that QEMU loads takes the first place itself.
        boot_index = -1 if config.linux or config.guest else 0
        image = Drive(config.image, name, config.image_disk_type, config.image_format, boot_index=boot_index)
        wanted.insert(0, (image, f"--image={config.image}"))
    discard = "unmap" if config.discard_disk else "ignore"
    for number, (drive, option) in enumerate(wanted):
        # NVMe disks tell the guest of errors, whatever is said for all.
        on_error = drive.on_error or (config.on_error if buses.TABLE[drive.bus].stops else "")
        drive = drive._replace(discard=discard, on_error=on_error)
        launched.boot_drives.append(_open_boot_drive(launched, number, drive, option))
    for volume in config.volumes:
        launched.boot_drives.append(_acquire_boot_drive(launched, len(launched.boot_drives), volume, discard))


def _acquire_boot_drive(launched: Launched, number: int, volume: Volume, discard: str) -> BootDrive:
    drive = Drive("", volume.drive_name, volume.config or DEFAULT_BUS, "raw", discard=discard)
    _check_drive_name(launched, drive)
    try:
        read_only = drive.bus == "scsi-cd"
        fd = storageprovider.acquire(volume, user=launched.config.registration.user, read_only=read_only)
        try:
            backing = backings.inspect(fd, what=volume.drive_name, read_only=read_only or None)
        except BaseException:
            os.close(fd)
            raise
    except (VmspawnError, OSError) as error:
        raise StartError(f"--bind-volume=: {error}", hint=getattr(error, "hint", "")) from None
    return _boot_drive(launched, number, drive, backing, f"--bind-volume={volume.drive_name}")


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


def _open_boot_drive(launched: Launched, number: int, drive: Drive, option: str) -> BootDrive:
    _check_drive_name(launched, drive)
    overlaid = launched.config.ephemeral and option.startswith("--image=")
    try:
        read_only = overlaid or drives.is_only_read(drive.bus, drive.format, read_only=drive.read_only)
        backing = backings.open_drive(drive.path, read_only=read_only)
    except (BadConfig, SystemFailure) as error:
        reason = str(error).removeprefix(f"cannot open {drive.path}: ")
        raise StartError(f"cannot use {option}: {reason}", hint=error.hint) from None
    return _boot_drive(launched, number, drive, backing, option)


def _check_drive_name(launched: Launched, drive: Drive) -> None:
    for other in launched.boot_drives:
        if other.drive.name == drive.name:
            raise UsageError(f"two drives are called {drive.name}", hint="give the files different names")


def _boot_drive(launched: Launched, number: int, drive: Drive, backing: Backing, option: str) -> BootDrive:
    """Make an open image a drive. Owns `backing` from the call on."""
    try:
        image_format = _boot_format(backing, drive, option)
        _check_once(launched, backing, option)
        backings.set_direct(backing, drive.cache == "none", what=drive.path)
        place = _boot_place(launched, drive)
    except BaseException:
        backing.close()
        raise
    is_image = option.startswith("--image=") and drive.bus != "scsi-cd"
    if is_image:
        backing, image_format = _prepare_image(launched, backing, image_format, drive.path)
    serial = drive.serial or drives.serial_for(drive.name)
    image = Image(number, backing, image_format, drive.path)
    drive = drive._replace(read_only=not backing.writable)
    return BootDrive(
        drive, Identifiers(number), place, image, serial, BASE_NODE if is_image and launched.config.ephemeral else None
    )


def _check_once(launched: Launched, backing: Backing, option: str) -> None:
    for other in launched.boot_drives:
        used = other.image.backing
        if used is not None and used.identity == backing.identity and (used.writable or backing.writable):
            raise StorageExists(f"{option} is the same file as another drive")


def _boot_format(backing: Backing, drive: Drive, option: str) -> str:
    if not backing.size and drive.bus != "scsi-cd":
        raise StartError(f"cannot use {option}: the image is empty", hint="make one with: qemu-img create IMAGE SIZE")
    try:
        return formats.choose_format(backing, drive.format, what=drive.path)
    except (BadConfig, ConfigNotSupported) as error:
        hint = error.hint.replace("say format ", "say --image-format=") if option.startswith("--image=") else error.hint
        raise StartError(f"cannot use {option}: {error}", hint=hint) from None


def _boot_place(launched: Launched, drive: Drive) -> places.Place:
    """SCSI drives go to the controller, the others to slots, which on `pc` the hot-plug pool must not hand out too."""
    layout = launched.layout
    if drive.bus in ("virtio-scsi", "scsi-cd"):
        return layout.scsi.take()
    if drive.bus == "nvme-ns":
        if not layout.namespaces.places:
            raise StartError(
                f"cannot use {drive.path} on nvme-ns: {places.NO_NAMESPACES}", hint=places.NO_NAMESPACES_HINT
            )
        return layout.namespaces.take_for(drive.name)
    place = layout.boot.take()
    layout.pci.claim(place)
    return place

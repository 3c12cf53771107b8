# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open, check and place the disks that QEMU starts with; grow the image or put an overlay on it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

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
from .overlay import Below, grow, overlay

if TYPE_CHECKING:
    from .config import MachineConfig


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


class _Wanted(NamedTuple):
    """A disk of the configuration. `subject` is what messages call it."""

    disk: Disk
    subject: str
    is_image: bool = False
    #: The volume that becomes the disk, in place of a path.
    volume: Volume | None = None


def open_boot_disks(config: MachineConfig, layout: places.Layout, folder: str) -> tuple[BootDisk, ...]:
    """Open the image, the extra disks and the volumes, in the order in which the guest finds them.

    `layout` gives each disk its place; an ephemeral machine's overlay goes to `folder`. The caller closes the disks
    once QEMU has their descriptors. Raises StartError, UsageError, StorageExists or NoFreePort; every disk that was
    opened is closed then.
    """
    found: list[BootDisk] = []
    with contextlib.ExitStack() as on_failure:
        for number, wanted in enumerate(_wanted(config)):
            _check_disk_name(found, wanted.disk)
            backing = _acquire(config, wanted, wanted.volume) if wanted.volume else _open(config, wanted)
            opened = _boot_disk(config, layout, folder, number, wanted, backing, found)
            on_failure.callback(opened.close)
            found.append(opened)
        on_failure.pop_all()
    return tuple(found)


def _wanted(config: MachineConfig) -> Iterator[_Wanted]:
    """The disks of the configuration, with what the configuration sets for all of them."""
    discard = "unmap" if config.discard_disk else "ignore"
    wanted = [_Wanted(disk, f"--extra-drive={disk.path}") for disk in config.extra_disks]
    if config.image:
        # A kernel that QEMU loads takes the first place itself.
        boot_index = -1 if config.linux or config.guest else 0
        name = default_name(config.image)
        image = Disk(config.image, name, config.image_disk_type, config.image_format, boot_index=boot_index)
        wanted.insert(0, _Wanted(image, f"--image={config.image}", is_image=True))
    for each in wanted:
        # NVMe disks always report errors to the guest.
        on_error = each.disk.on_error or (config.on_error if buses.TABLE[each.disk.bus].stops else "")
        yield each._replace(disk=each.disk._replace(discard=discard, on_error=on_error))
    for volume in config.volumes:
        disk = Disk("", volume.disk_name, volume.config or DEFAULT_BUS, "raw", discard=discard)
        yield _Wanted(disk, f"--bind-volume={volume.disk_name}", volume=volume)


def _acquire(config: MachineConfig, wanted: _Wanted, volume: Volume) -> Backing:
    """Acquire a volume from its provider."""
    read_only = wanted.disk.bus == "scsi-cd"
    try:
        fd = storageprovider.acquire(volume, user=config.registration.user, read_only=read_only)
        try:
            return backings.inspect(fd, what=volume.disk_name, read_only=read_only or None)
        except BaseException:
            os.close(fd)
            raise
    except (VmspawnError, OSError) as error:
        raise StartError(f"--bind-volume=: {error}", hint=getattr(error, "hint", "")) from None


def _open(config: MachineConfig, wanted: _Wanted) -> Backing:
    """Open a disk's image."""
    disk = wanted.disk
    is_overlaid = wanted.is_image and config.ephemeral
    try:
        read_only = is_overlaid or disks.is_only_read(disk.bus, disk.format, read_only=disk.read_only)
        return backings.open_disk(disk.path, read_only=read_only)
    except (BadConfig, SystemFailure) as error:
        reason = str(error).removeprefix(f"cannot open {disk.path}: ")
        raise StartError(f"cannot use {wanted.subject}: {reason}", hint=error.hint) from None


def _check_disk_name(others: Iterable[BootDisk], disk: Disk) -> None:
    for other in others:
        if other.disk.name == disk.name:
            raise UsageError(f"two disks are called {disk.name}", hint="give the files different names")


def _boot_disk(
    config: MachineConfig,
    layout: places.Layout,
    folder: str,
    number: int,
    wanted: _Wanted,
    backing: Backing,
    others: Iterable[BootDisk],
) -> BootDisk:
    """Make an open image a disk beside the others. Owns `backing` from the call on."""
    disk = wanted.disk
    below = None
    try:
        image_format = _boot_format(backing, wanted)
        _check_once(others, backing, wanted.subject)
        backings.set_direct(backing, disk.cache == "none", what=disk.path)
        place = _boot_place(layout, disk)
        if wanted.is_image and disk.bus != "scsi-cd":
            backing, image_format, below = _prepare_image(config, folder, backing, image_format, disk.path)
    except BaseException:
        backing.close()
        raise
    serial = disk.serial or disks.serial_for(disk.name)
    image = Image(number, backing, image_format, disk.path)
    disk = disk._replace(read_only=not backing.writable)
    return BootDisk(disk, Identifiers(number), place, image, serial, below, is_image=wanted.is_image)


def _prepare_image(
    config: MachineConfig, folder: str, backing: Backing, image_format: str, path: str
) -> tuple[Backing, str, Below | None]:
    """Grow the image or put an overlay on it, if configured. `backing` stays the caller's on failure."""
    if config.ephemeral:
        fresh, below = overlay(backing, image_format, path=path, folder=folder, grow_to=config.grow_image)
        return fresh, "qcow2", below
    if config.grow_image is not None:
        return grow(backing, image_format, config.grow_image, path=path), image_format, None
    return backing, image_format, None


def _check_once(others: Iterable[BootDisk], backing: Backing, subject: str) -> None:
    for other in others:
        used = other.image.backing
        if used is not None and used.identity == backing.identity and (used.writable or backing.writable):
            raise StorageExists(f"{subject} is the same file as another disk")


def _boot_format(backing: Backing, wanted: _Wanted) -> str:
    disk, subject = wanted.disk, wanted.subject
    if not backing.size and disk.bus != "scsi-cd":
        raise StartError(f"cannot use {subject}: the image is empty", hint="make one with: qemu-img create IMAGE SIZE")
    try:
        return formats.choose_format(backing, disk.format, what=disk.path)
    except (BadConfig, ConfigNotSupported) as error:
        hint = error.hint.replace("say format ", "say --image-format=") if wanted.is_image else error.hint
        raise StartError(f"cannot use {subject}: {error}", hint=hint) from None


def _boot_place(layout: places.Layout, disk: Disk) -> places.Place:
    """SCSI disks go to the controller, the others to slots, which on `pc` the hot-plug pool must not hand out too."""
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

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Opens, checks and places the disks that QEMU starts with, and grows the image or puts an overlay on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from ..errors import BadConfig, ConfigNotSupported, StartError, StorageExists, SystemFailure, UsageError, VmspawnError
from ..host import storageprovider
from ..host.storageprovider import Volume
from ..hotplug import places
from ..record import Record
from ..storage import admission, buses, formats
from ..storage.backing import Backing, open_disk, take_descriptor
from ..storage.disk import DEFAULT_BUS, Disk, is_only_read
from ..storage.image import Image
from ..storage.nodes import Identifiers
from .boot_disk import BootDisk
from .config import MachineConfig
from .overlay import Below, grow, overlay


class _Wanted(Record):
    """A disk of the configuration, with the field and the value that describe it."""

    disk: Disk
    field: str
    value: str
    is_image: bool = False
    #: The volume to use as the disk, instead of a path.
    volume: Volume | None = None

    @property
    def spelled(self) -> str:
        """The field and its value in a template for `with_fields`, whose argument `value` is the value."""
        return f"{{{self.field}={{value}}}}"


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
    """Yield the configuration's disks. The configuration's settings for all disks are added to each."""
    discard = "unmap" if config.discard_disk else "ignore"
    wanted = [_Wanted(disk, "extra_disks", disk.path) for disk in config.extra_disks]
    if (image := config.image_disk) is not None:
        wanted.insert(0, _Wanted(image, "image", image.path, is_image=True))
    for each in wanted:
        # NVMe disks always report errors to the guest.
        on_error = each.disk.on_error or (config.on_error if buses.TABLE[each.disk.bus].can_stop_guest else "")
        yield each._replace(disk=each.disk._replace(discard=discard, on_error=on_error))
    for volume in config.volumes:
        disk = Disk("", volume.disk_name, volume.config or DEFAULT_BUS, "raw", discard=discard)
        yield _Wanted(disk, "volumes", volume.disk_name, volume=volume)


@contextlib.contextmanager
def _blaming(wanted: _Wanted) -> Iterator[None]:
    """Convert errors about a disk to a StartError that names the disk's field."""
    try:
        yield
    except (BadConfig, ConfigNotSupported, SystemFailure) as error:
        error.prefix("", instead_of=f"cannot open {wanted.disk.path}: ")
        hint = "{error}"
        if wanted.is_image and error.hint.startswith(formats.FORMAT_HINT):
            hint = "use {image_format=}{choice}"
        elif wanted.is_image and error.hint.startswith("attach it read-only"):
            hint = "use {ephemeral=True}, which does not write to the image, or a copy"
        raise StartError.with_fields(
            "cannot use " + wanted.spelled + ": {error}",
            hint=hint,
            value=wanted.value,
            error=error,
            choice=error.hint.removeprefix(formats.FORMAT_HINT),
        ) from None


def _acquire(config: MachineConfig, wanted: _Wanted, volume: Volume) -> Backing:
    """Acquire a volume from its provider."""
    read_only = wanted.disk.bus == "scsi-cd"
    try:
        fd = storageprovider.acquire(volume, user=config.registration.user, read_only=read_only)
        return take_descriptor(fd, what=volume.disk_name, read_only=read_only or None)
    except (VmspawnError, OSError) as error:
        reason, hint = str(error), getattr(error, "hint", "")
        raise StartError.with_fields(
            "{volumes=}: {reason}", hint="{hint_text}", reason=reason, hint_text=hint
        ) from None


def _open(config: MachineConfig, wanted: _Wanted) -> Backing:
    """Open a disk's image."""
    disk = wanted.disk
    is_overlaid = wanted.is_image and config.ephemeral
    with _blaming(wanted):
        if not disk.path:
            raise BadConfig("it has no image", hint="attach an empty optical drive once the machine runs")
        read_only = is_overlaid or is_only_read(disk.bus, disk.format, read_only=disk.read_only)
        return open_disk(disk.path, read_only=read_only)


def _check_disk_name(others: Iterable[BootDisk], disk: Disk) -> None:
    if admission.find_name(others, disk.name):
        raise UsageError(f"two disks are named {disk.name}", hint="give the files different names")


def _boot_disk(
    config: MachineConfig,
    layout: places.Layout,
    folder: str,
    number: int,
    wanted: _Wanted,
    backing: Backing,
    others: Iterable[BootDisk],
) -> BootDisk:
    """Admit an open image as a disk. Owns `backing` from the call on."""
    below = None
    try:
        if admission.find_file(others, backing, share=wanted.disk.share):
            raise StorageExists.with_fields(wanted.spelled + " is the same file as another disk", value=wanted.value)
        with _blaming(wanted):
            _check_thread(wanted.disk)
            image_format = formats.choose_format(backing, wanted.disk.format, what="the image")
            disk, serial, image, place = admission.admit(
                wanted.disk,
                backing,
                image_format,
                others,
                number=number,
                layout=layout,
                pci=layout.boot,
                scsi=layout.scsi,
                what="the image",
            )
        assert image is not None
        # On `pc`, boot disks and hot-plugged disks share the slots.
        layout.pci.claim(place)
        if wanted.is_image and disk.bus != "scsi-cd":
            backing, image_format, below = _prepare_image(config, folder, backing, image.format, disk.path)
            image = Image(number, backing, image_format, disk.path)
    except BaseException:
        backing.close()
        raise
    disk = disk._replace(read_only=not backing.is_writable)
    return BootDisk(disk, Identifiers(number), place, image, serial, below, is_image=wanted.is_image)


def _check_thread(disk: Disk) -> None:
    if disk.thread and disk.bus == "virtio-scsi":
        raise ConfigNotSupported(
            "a disk on bus virtio-scsi cannot have an I/O thread from boot",
            hint="use bus virtio-blk, or attach it once the machine runs",
        )


def _prepare_image(
    config: MachineConfig, folder: str, backing: Backing, image_format: str, path: str
) -> tuple[Backing, str, Below | None]:
    """Grow the image or put an overlay on it, if configured. On failure the caller keeps `backing`."""
    if config.ephemeral:
        fresh, below = overlay(backing, image_format, path=path, folder=folder, grow_to=config.grow_image)
        return fresh, "qcow2", below
    if config.grow_image is not None:
        return grow(backing, image_format, config.grow_image, path=path), image_format, None
    return backing, image_format, None

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Detaches the disks that QEMU cannot save, and attaches them again after the save."""

from __future__ import annotations

import contextlib

from ..boot.incoming import Option
from ..errors import VmspawnError
from ..machine.running import Running
from ..storage.attached_disk import AttachedDisk
from ..storage.backing import Backing, take_descriptor
from ..storage.disk import Disk
from . import blockers
from .open_files import OpenFiles


async def detach_blocking(machine: Running, options: tuple[Option, ...], afterwards: contextlib.AsyncExitStack) -> None:
    """Detach the disks that cannot be saved; `afterwards` attaches them again. `options` are QEMU's options.

    Raises what `Storage.detach` raises.
    """
    blocking = {each.disk for each in await blockers.find(machine, options) if each.disk}
    files = OpenFiles(machine.pid)
    for disk in [each for each in machine.storage if each.name in blocking]:
        backing = _open_again(files, disk)
        if backing is None:
            continue
        wanted = disk.disk._replace(format=disk.images[0].format, limits=disk.limits)
        try:
            await machine.storage.detach(disk.name)
        except BaseException:
            backing.close()
            raise
        afterwards.push_async_callback(_attach_again, machine, wanted, backing)


def _open_again(files: OpenFiles, disk: AttachedDisk) -> Backing | None:
    """Open the disk's image a second time. Returns None for a disk that cannot be attached again."""
    image = disk.image
    if image is None or image.backing is None or image.base is not None:
        return None
    return take_descriptor(files.open(image.backing.identity, read_only=not image.is_writable), what=disk.name)


async def _attach_again(machine: Running, disk: Disk, backing: Backing) -> None:
    """Attach a disk that was detached for the save. Raises what `Storage.attach` raises."""
    try:
        await machine.storage.attach(disk, backing)
    except VmspawnError as error:
        error.prefix(f"{disk.name} was detached for the snapshot and cannot be attached again: ")
        raise

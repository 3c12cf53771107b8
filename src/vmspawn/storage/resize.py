# SPDX-License-Identifier: LGPL-2.1-or-later
"""Another size for a disk that is in use: the image is grown, and the guest sees it at once.

What QEMU does then is in docs/qemu.md, "Block nodes and locks".
"""

from __future__ import annotations

import os

from ..errors import BadConfig, ConfigNotSupported
from . import buses
from .attached_disk import AttachedDisk
from .context import Context

#: What sizes are multiples of.
SECTOR = 512


async def resize(context: Context, attachment: AttachedDisk, size: int | None, *, shrink: bool) -> int:
    """Give the disk and its image that many bytes, or None: tell the guest the size that the image has by now.

    Returns the new size. Raises BadConfig for a size that cannot be, ConfigNotSupported where the disk cannot change,
    QmpError in QEMU's words otherwise.
    """
    _check_resizable(attachment)
    image = attachment.images[0]
    assert image.backing is not None
    pivot = attachment.identifiers.pivot
    current = await context.virtual_size(pivot)
    if size is None:
        # QEMU looks at a block device again whatever it is told, and changes nothing there.
        size = current if image.backing.block else _size_of_file(image.path, image.backing.identity, image.format)
    if size <= 0 or size % SECTOR:
        raise BadConfig(f"a disk cannot have {size} bytes", hint=f"use a multiple of {SECTOR}")
    if size < current and image.backing.block:
        raise ConfigNotSupported("a block device has the size that it has", hint="resize the device itself")
    if size < current and not shrink:
        raise BadConfig(
            f"the disk has {current} bytes, and what is beyond {size} would be lost", hint="say so by --shrink"
        )
    await context.monitor.execute("block_resize", {"node-name": pivot, "size": size})
    return await context.virtual_size(pivot)


def _check_resizable(attachment: AttachedDisk) -> None:
    bus = attachment.disk.bus
    if not buses.TABLE[bus].resizable:
        reason = "an optical disk" if bus == "scsi-cd" else f"a disk on bus {bus}"
        raise ConfigNotSupported(
            f"{reason} cannot change its size while it is attached (QEMU's device does not allow it)",
            hint="detach it, resize the image, and attach it again",
        )
    if attachment.read_only:
        raise ConfigNotSupported(f"{attachment.name} is read-only", hint="attach it writable")


def _size_of_file(path: str, identity: tuple[int, ...], image_format: str) -> int:
    """What the image has grown to, if that can be seen from outside."""
    try:
        found = os.stat(path) if path and image_format == "raw" else None
    except OSError:
        found = None
    if found is None or (found.st_dev, found.st_ino) != identity:
        raise BadConfig("the image does not tell its size from outside", hint="say which size")
    return found.st_size - found.st_size % SECTOR

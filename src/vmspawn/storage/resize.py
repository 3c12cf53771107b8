# SPDX-License-Identifier: LGPL-2.1-or-later
"""Changes the size of a disk in use (docs/qemu.md, "Block nodes and locks"); the guest sees the new size at once.

`block_resize` sets a raw file's length to the given bytes, whatever its present length is, and rounds the disk's size
up to whole sectors. For a block device, it refuses sizes larger than the device, and otherwise gives the disk all of
the device.
"""

from __future__ import annotations

import asyncio
import errno
import os

from ..errors import BadConfig, ConfigNotSupported, QmpError
from . import buses
from .attached_disk import AttachedDisk
from .backing import SECTOR, size_now, whole_sectors
from .block_graph import blaming_users
from .context import Context
from .image import Image

#: The largest size that QEMU accepts: INT64_MAX in whole GiB.
SIZE_MAX = (1 << 63) - (1 << 30)


async def resize_disk(context: Context, attachment: AttachedDisk, size: int | None, *, shrink: bool) -> int:
    """Resize a disk and its image to `size` bytes; with None, resize the disk to the present size of the image.

    Returns the new size. Shortens a file only if `shrink` is true and a size is given. Raises BadConfig for an invalid
    size, ConfigNotSupported if the disk cannot be resized, and QmpError for QEMU's other errors.
    """
    _check_resizable(attachment)
    image = attachment.images[0]
    current = await context.virtual_size(attachment.identifiers.pivot)
    actual = await _size_outside(image)
    if size is None:
        wanted = _wanted_from_outside(image, actual, current)
    else:
        wanted = _check_size(image, size, actual=actual, current=current, shrink=shrink)
    if whole_sectors(wanted) == current == whole_sectors(current if actual is None else actual):
        return current
    await _resize(context, attachment, wanted)
    return await context.virtual_size(attachment.identifiers.pivot)


async def follow_image(context: Context, attachment: AttachedDisk) -> None:
    """Resize a disk to the size of its new image, and tell the guest. Raises QmpError."""
    image = attachment.images[0]
    size = await _size_outside(image)
    if size is None:
        size = await context.virtual_size(image.top_node)
    # The pivot may have the new size already (QEMU 11.1). Only this command tells the device, and so the guest.
    await _block_resize(context, attachment, size)


def _check_resizable(attachment: AttachedDisk) -> None:
    bus = attachment.disk.bus
    if not buses.TABLE[bus].is_resizable:
        reason = "an optical disk" if bus == "scsi-cd" else f"a disk on bus {bus}"
        raise ConfigNotSupported(
            f"{reason} cannot change its size while it is attached (QEMU's device does not allow it)",
            hint="detach it, resize the image, and attach it again",
        )
    if attachment.read_only:
        raise ConfigNotSupported(f"{attachment.name} is read-only", hint="attach it writable")


async def _size_outside(image: Image) -> int | None:
    """Return the present size in bytes of a raw image, or None if the host does not show it."""
    if image.backing is None or image.format != "raw":
        return None
    identity, is_block_device = image.backing.identity, image.backing.is_block_device
    # Storage that hangs blocks stat(2) too.
    return await asyncio.to_thread(size_now, image.path, identity, is_block_device=is_block_device)


def _wanted_from_outside(image: Image, actual: int | None, current: int) -> int:
    if actual is None and _is_device(image):
        return current  # QEMU reads the size from the device
    if actual is None:
        raise BadConfig("cannot find the image's size on the host", hint="specify the size")
    if not actual:
        raise BadConfig("the image is empty", hint="restore the image's size on the host, or specify a size")
    return actual


def _check_size(image: Image, size: int, *, actual: int | None, current: int, shrink: bool) -> int:
    if size <= 0 or size % SECTOR or size > SIZE_MAX:
        near = min(max(whole_sectors(size), SECTOR), SIZE_MAX)
        raise BadConfig(f"a disk cannot have {size} bytes", hint=f"use a multiple of {SECTOR}, such as {near}")
    if _is_device(image):
        has = current if actual is None else actual
        if size != has:
            raise ConfigNotSupported(
                f"cannot resize a block device to {size} bytes: it has {has} bytes",
                hint="resize the device on the host, then repeat this without a size",
            )
        return size
    if actual is not None and whole_sectors(actual) > max(size, current) and not shrink:
        raise BadConfig.with_fields(
            "the image has {actual} bytes, and the data beyond {size} would be lost",
            hint="leave the size out to give the disk all of the image, or allow the loss with {shrink=True}",
            actual=actual,
            size=size,
        )
    if size < current and not shrink:
        raise BadConfig.with_fields(
            "the disk has {current} bytes, and the data beyond {size} would be lost",
            hint="allow the loss with {shrink=True}",
            current=current,
            size=size,
        )
    return size


def _is_device(image: Image) -> bool:
    """Return whether the disk has the size of a block device. A disk in another format than raw can have any size."""
    return image.backing is not None and image.backing.is_block_device and image.format == "raw"


async def _block_resize(context: Context, attachment: AttachedDisk, size: int) -> None:
    arguments = {"node-name": attachment.identifiers.pivot, "size": size}
    async with blaming_users(context.monitor, attachment):
        await context.monitor.execute("block_resize", arguments)


async def _resize(context: Context, attachment: AttachedDisk, size: int) -> None:
    try:
        await _block_resize(context, attachment, size)
    except QmpError as error:
        for reason in (errno.EFBIG, errno.ENOSPC):
            if error.description.endswith(os.strerror(reason)):
                raise BadConfig(
                    f"the image cannot have {size} bytes ({os.strerror(reason)})",
                    hint="choose a smaller size, or move the image to another file system and replace it",
                ) from None
        raise

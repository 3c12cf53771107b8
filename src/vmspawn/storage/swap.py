# SPDX-License-Identifier: LGPL-2.1-or-later
"""Replaces a disk's image while the guest uses the disk, with another image or with one that fails every request.

Also changes a disk's limits.

Each operation runs to its end once it has begun. An operation that fails leaves the disk as it was.
"""

from __future__ import annotations

import contextlib

from ..errors import BadConfig, ConfigNotSupported, QmpError, SystemFailure
from . import buses, images, nodes
from .attached_disk import AttachedDisk
from .block_graph import blaming_users
from .context import Context
from .image import FAULT, Image
from .limits import Limits
from .resize import follow_image

#: Seconds that QEMU may take to put another node below the pivot. It waits for all requests in flight, however long the
#: host's storage takes (docs/qemu.md, "The pivot"), and handles no other command meanwhile.
REOPEN_TIMEOUT = 3600.0

#: The size in bytes of the image that fails every request, if the disk's size is unknown.
_FAULT_SIZE = 16 << 20


async def replace(context: Context, attachment: AttachedDisk, fresh: Image, *, shrink: bool) -> int:
    """Replace the disk's image, and resize the disk to the new image's size. Returns that size in bytes.

    The old image is closed at once; if QMP clients use it, it is closed when their use ends. Raises BadConfig or
    ConfigNotSupported if the guest could not use the new size, QmpError if QEMU cannot use the image. The descriptor of
    `fresh` is closed in any case.
    """
    old = attachment.images[0]
    size = await context.virtual_size(attachment.identifiers.pivot)
    attachment.images.append(fresh)
    try:
        await images.build(context.hotplug, attachment, fresh)
        new_size = await context.virtual_size(fresh.top_node)
        _check_size(attachment, size, new_size, shrink=shrink)
        await _put_under(context, attachment, fresh)
        try:
            if new_size != size:
                await follow_image(context, attachment)
        except (QmpError, SystemFailure):
            await _put_under(context, attachment, old)
            raise
    except (QmpError, BadConfig, ConfigNotSupported, SystemFailure):
        await images.dismantle(context.hotplug, attachment, fresh)
        raise
    await images.close_when_unused(context.hotplug, attachment, old)
    return new_size


def _check_size(attachment: AttachedDisk, size: int, new_size: int, *, shrink: bool) -> None:
    if new_size == size:
        return
    if attachment.read_only or not buses.TABLE[attachment.disk.bus].is_resizable:
        which = "a read-only disk" if attachment.read_only else f"a disk on bus {attachment.disk.bus}"
        raise ConfigNotSupported(
            f"the new image has {new_size} bytes and the disk {size}, and {which} cannot change its size",
            hint="use an image of the same size, or detach the disk and attach the image",
        )
    if new_size < size and not shrink:
        raise BadConfig.with_fields(
            "the new image has {new} bytes and the disk {old}",
            hint="allow the disk to shrink with {shrink=True}",
            new=new_size,
            old=size,
        )


async def _put_under(context: Context, attachment: AttachedDisk, image: Image) -> None:
    """Put `image` below the pivot; it becomes the first of the disk's images."""
    options = nodes.pivot_node(attachment.identifiers, image, attachment.disk, read_only=attachment.read_only)
    async with blaming_users(context.monitor, attachment):
        await context.monitor.execute("blockdev-reopen", {"options": [options]}, timeout=REOPEN_TIMEOUT)
    attachment.images.remove(image)
    attachment.images.insert(0, image)
    # The swap is done, and a failure to save does not undo it. The journal names both images, and an adoption finds out
    # which image is in use.
    with contextlib.suppress(SystemFailure):
        context.hotplug.save(attachment)


async def limit(context: Context, attachment: AttachedDisk, limits: Limits) -> None:
    """Change a disk's limits. Raises QmpError."""
    arguments = {
        "path": f"/objects/{attachment.identifiers.limits}",
        "property": "limits",
        "value": limits.to_qemu(),
    }
    await context.monitor.execute("qom-set", arguments)
    attachment.limits = limits
    context.hotplug.save(attachment)


async def take_away(context: Context, attachment: AttachedDisk) -> None:
    """Replace a disk's image by one that fails every request; close the old image, so that the host can use it.

    An image that QMP clients use is closed when their use ends.
    """
    if not attachment.is_forced and attachment.images:
        await _put_errors_under(context, attachment)
    if attachment.is_forced:
        for image in attachment.images[1:]:
            await images.close_when_unused(context.hotplug, attachment, image)


async def _put_errors_under(context: Context, attachment: AttachedDisk) -> None:
    try:
        size = await context.virtual_size(attachment.identifiers.pivot)
    except KeyError:
        return  # the disk's nodes are being removed already
    fault = Image(context.register.fresh_number(), None, FAULT, size=size or _FAULT_SIZE)
    attachment.images.append(fault)
    try:
        await images.build(context.hotplug, attachment, fault)
        await _put_under(context, attachment, fault)
    except (QmpError, SystemFailure):
        await images.dismantle(context.hotplug, attachment, fault)
        raise

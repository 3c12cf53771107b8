# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open and close images of a disk that is attached."""

from __future__ import annotations

import contextlib

from ..aio.waiting import first_of
from ..errors import QmpError, Timeout
from ..hotplug.hotplug import Hotplug
from . import image_nodes
from .attached_disk import AttachedDisk
from .image import Image


async def build(hotplug: Hotplug, attached: AttachedDisk, image: Image) -> None:
    """Make an image's nodes. Raises what `Monitor.execute` raises; then some nodes may be there."""
    commands = image_nodes.commands(attached.disk, image)
    spent = image_nodes.spent(image)
    hotplug.begun(attached)
    for result in await hotplug.monitor.execute_all(commands, behind=[each.removal for each in spent]):
        if isinstance(result, QmpError):
            raise result
    image_nodes.made(image)
    hotplug.removed(*spent)


async def release(hotplug: Hotplug, image: Image) -> None:
    """Drop the descriptor set of an image that QEMU was started with, or that another manager has made."""
    if spent := image_nodes.spent(image):
        await hotplug.remove(*spent)
        image_nodes.made(image)


#: Seconds after which the removal of an image that QEMU refused is tried again.
_REFUSED_RETRY = 2.0


async def close_when_unused(hotplug: Hotplug, attached: AttachedDisk, image: Image) -> None:
    """Close an image that the disk has left; in the background if somebody uses one of its nodes through QMP.

    The image stays one of the disk's until it is closed. Raises NotConnected.
    """
    try:
        await dismantle(hotplug, attached, image)
    except (QmpError, Timeout):
        if image not in attached.closing:
            attached.closing.append(image)
            hotplug.tasks.start(_close(hotplug, attached, image))


async def _close(hotplug: Hotplug, attached: AttachedDisk, image: Image) -> None:
    while image in attached.images:
        await first_of(attached.gone, timeout=_REFUSED_RETRY)
        if attached.gone.is_set():
            break  # all of the disk is taken apart
        async with attached.lock:
            if image in attached.images:
                with contextlib.suppress(QmpError, Timeout):
                    await dismantle(hotplug, attached, image)
    attached.closing.remove(image)


async def dismantle(hotplug: Hotplug, attached: AttachedDisk, image: Image) -> None:
    """Remove an image's nodes, and forget it. May be called again where it failed."""
    image.close_backing()
    await hotplug.remove(*image_nodes.objects(image))
    image.done = []
    if image in attached.images:
        attached.images.remove(image)
    hotplug.undone(attached)

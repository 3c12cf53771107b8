# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open and close images of a disk that is attached."""

from __future__ import annotations

from ..errors import QmpError
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


async def dismantle(hotplug: Hotplug, attached: AttachedDisk, image: Image) -> None:
    """Remove an image's nodes, and forget it. May be called again where it failed."""
    image.close_backing()
    await hotplug.remove(*image_nodes.objects(image))
    image.done = []
    if image in attached.images:
        attached.images.remove(image)
    hotplug.undone(attached)

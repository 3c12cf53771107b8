# SPDX-License-Identifier: LGPL-2.1-or-later
"""Opens and closes images of an attached disk."""

from __future__ import annotations

import contextlib

from ..aio.threads import run_and_close
from ..aio.waiting import first_of
from ..errors import QmpError, Timeout
from ..hotplug.hotplug import Hotplug
from . import formats, image_nodes
from .attached_disk import AttachedDisk
from .backing import Backing
from .image import Image
from .page_cache import read_cached


async def choose_format(backing: Backing, image_format: str | None, *, what: str) -> str:
    """Return the format to use, as `formats.choose_format` does; storage that hangs does not stop the event loop."""
    with contextlib.suppress(BlockingIOError):
        return formats.choose_format(backing, image_format, what=what, pread=read_cached)
    # The caller may close its own descriptor while the thread still reads.
    own = backing.copy()
    return await run_and_close(lambda: formats.choose_format(own, image_format, what=what), own.close)


async def build(hotplug: Hotplug, attached: AttachedDisk, image: Image) -> None:
    """Make an image's nodes. Raises what `Monitor.execute` raises; some nodes may exist then."""
    commands = image_nodes.commands(attached.disk, image)
    spent = image_nodes.spent(image)
    hotplug.save_before_step(attached)
    for result in await hotplug.monitor.execute_all(commands, behind=[each.removal for each in spent]):
        if isinstance(result, QmpError):
            raise result
    image_nodes.made(image)
    hotplug.record_deferred(*spent)


async def release(hotplug: Hotplug, image: Image) -> None:
    """Remove the descriptor set of an image that QEMU was started with, or that another manager has opened."""
    for each in image.chain:
        if spent := image_nodes.spent(each):
            await hotplug.remove(*spent)
            image_nodes.made(each)


#: Seconds between two attempts to remove an image that QEMU refuses to remove.
_REFUSED_RETRY = 2.0


async def close_when_unused(hotplug: Hotplug, attached: AttachedDisk, image: Image) -> None:
    """Close a former image of the disk; continues in the background if a QMP client uses one of its nodes.

    The image stays in the disk's `images` until it is closed. Raises NotConnected.
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
            break  # the detach removes the disk's images
        async with attached.lock:
            if image in attached.images:
                with contextlib.suppress(QmpError, Timeout):
                    await dismantle(hotplug, attached, image)
    attached.closing.remove(image)


async def dismantle(hotplug: Hotplug, attached: AttachedDisk, image: Image) -> None:
    """Remove an image's nodes, and the image from the disk. After a failure, it can be called again."""
    image.close_backing()
    await hotplug.remove(*image_nodes.objects(image))
    for each in image.chain:
        each.done = []
    if image in attached.images:
        attached.images.remove(image)
    hotplug.save_after_undo(attached)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""An image made ready to be put under a disk's pivot, and taken apart again.

Its parts are made from the bottom up and removed from the top down. The journal names them before they are made, so a
part may never have come, or have been removed by a process that then died: "not there" is as good as removed.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import QmpError
from ..qmp.monitor import Command
from . import nodes
from .attached_disk import AttachedDisk
from .context import Context
from .disk import Disk
from .image import Image
from .qemu_objects import Part

#: The names of an image's parts in the journal, from the bottom up: the descriptor set that QEMU gets, so that it opens
#: no path of the user's; the block node on it; the node of the format.
FDSET, FILE, FORMAT = "fdset", "file", "format"


def plan(image: Image) -> list[str]:
    """The names of the parts that the image will have."""
    names = [FILE]
    if image.backing is not None:
        names.insert(0, FDSET)
    if image.format != "raw":
        names.append(FORMAT)
    return names


def commands(disk: Disk, image: Image) -> list[Command]:
    """What makes the image's parts. All of them are entered as made.

    The image's descriptor goes along and stays ours, until `made`.
    """
    image.done = plan(image)
    found = [Command("blockdev-add", nodes.file_node(image, disk))]
    if FORMAT in image.done:
        found.append(Command("blockdev-add", nodes.format_node(image, disk)))
    if image.backing is not None:
        found.insert(0, Command("add-fd", {"fdset-id": image.fdset}, (image.backing.fd,)))
    return found


def drops(images: Iterable[Image]) -> list[Command]:
    """What drops what only the making needed. Send it behind; nobody need wait for it."""
    # The file's node has a duplicate of the descriptor, and goes on with that.
    return [_part(image, FDSET).removal for image in images if image.backing is not None]


def made(context: Context, image: Image) -> None:
    """QEMU has made the parts, and drops the descriptor set."""
    image.close_backing()
    if FDSET in image.done:
        context.removed(_part(image, FDSET))
        image.done.remove(FDSET)


def parts(image: Image) -> list[Part]:
    """What the journal says of the image, from the top down."""
    return [_part(image, name) for name in reversed(image.done)]


def _part(image: Image, name: str) -> Part:
    if name == FDSET:
        return Part("fdset", image.fdset)
    return Part("node", image.file_node if name == FILE else image.format_node)


async def build(context: Context, attachment: AttachedDisk, image: Image) -> None:
    """Make the image of a disk that is there. Raises what `Monitor.execute` raises; then some parts may be there."""
    sent = commands(attachment.disk, image)
    context.journal_begun(attachment)
    for result in await context.monitor.execute_all(sent, behind=drops([image])):
        if isinstance(result, QmpError):
            raise result
    made(context, image)


async def release(context: Context, image: Image) -> None:
    """Drop the descriptor set of an image that QEMU was started with, or that another manager has made."""
    if FDSET in image.done:
        await context.remove(_part(image, FDSET))
        made(context, image)


async def dismantle(context: Context, attachment: AttachedDisk, image: Image) -> None:
    """Remove the image's parts, and forget it. May be called again where it failed."""
    image.close_backing()
    await context.remove(*parts(image))
    image.done = []
    if image in attachment.images:
        attachment.images.remove(image)
    context.journal_undone(attachment)

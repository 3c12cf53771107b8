# SPDX-License-Identifier: LGPL-2.1-or-later
"""An image made ready to be put under a disk's pivot, and taken apart again.

Its parts are made from the bottom up and removed from the top down. The journal names them before they are made, so a
part may never have come, or have been removed by a process that then died: "not there" is as good as removed.
"""

from __future__ import annotations

from ..hotplug.qemu_objects import FDSET as FDSET_KIND
from ..hotplug.qemu_objects import Kind, QemuObject
from ..qmp.monitor import Command
from . import nodes
from .disk import Disk
from .image import Image

#: Block nodes, made by blockdev-add.
NODE = Kind("blockdev-del", "node-name", "query-named-block-nodes", "node-name", (("flat", True),))

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


def spent(image: Image) -> list[QemuObject]:
    """What only the making needs: the file's node goes on with a duplicate of the descriptor."""
    return [_object(image, FDSET)] if FDSET in image.done else []


def made(image: Image) -> None:
    """Enter that QEMU has made the nodes, and dropped the descriptor set."""
    image.close_backing()
    if FDSET in image.done:
        image.done.remove(FDSET)


def objects(image: Image) -> list[QemuObject]:
    """What the journal says of the image, from the top down."""
    return [_object(image, name) for name in reversed(image.done)]


def _object(image: Image, name: str) -> QemuObject:
    if name == FDSET:
        return QemuObject(FDSET_KIND, image.fdset)
    return QemuObject(NODE, image.file_node if name == FILE else image.format_node)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes an image's parts in QEMU, and lists the parts to remove.

The parts are made from the bottom up and removed from the top down. The journal names them before they are made, so
QEMU may lack a part that the journal names: it was never made, or a manager removed it and died. A removal therefore
accepts "not found" as success.
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

#: The names of an image's parts in the journal, from the bottom up: the descriptor set, by which QEMU opens the file
#: without its path; the block node of the file; the block node of the format.
FDSET, FILE, FORMAT = "fdset", "file", "format"


def plan(image: Image) -> list[str]:
    """Return the names of the parts that the image needs, from the bottom up."""
    names = [FILE]
    if image.backing is not None:
        names.insert(0, FDSET)
    if image.format != "raw":
        names.append(FORMAT)
    return names


def commands(disk: Disk, image: Image) -> list[Command]:
    """Return the commands that make the image's parts, and enter all parts in the journal.

    The commands carry the image's descriptor, which the manager owns until `made`.
    """
    image.done = plan(image)
    found = [Command("blockdev-add", nodes.file_node(image, disk))]
    if FORMAT in image.done:
        found.append(Command("blockdev-add", nodes.format_node(image, disk)))
    if image.backing is not None:
        found.insert(0, Command("add-fd", {"fdset-id": image.fdset}, (image.backing.fd,)))
    return found


def spent(image: Image) -> list[QemuObject]:
    """Return the parts that are not needed after the image is made: the file's node duplicates the descriptor."""
    return [_object(image, FDSET)] if FDSET in image.done else []


def made(image: Image) -> None:
    """Enter in the journal that QEMU has made the nodes and removed the descriptor set. Closes the descriptor."""
    image.close_backing()
    if FDSET in image.done:
        image.done.remove(FDSET)


def objects(image: Image) -> list[QemuObject]:
    """Return the parts in the journal of the image and of all images below it, from the top down."""
    return [_object(each, name) for each in image.chain for name in reversed(each.done)]


def _object(image: Image, name: str) -> QemuObject:
    if name == FDSET:
        return QemuObject(FDSET_KIND, image.fdset)
    return QemuObject(NODE, image.file_node if name == FILE else image.format_node)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tell what QEMU has under each disk, for lists."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from . import displaced
from .attached_disk import AttachedDisk
from .block_graph import BlockGraph, nodes_of


class Look(NamedTuple):
    """What QEMU has under a disk.

    `size` is in bytes, as the guest sees it; an optical drive without a medium has 0. `path` is the file that the guest
    works on, as far as it is known. `notice` says what is not as it should be, and is empty if all is.
    """

    size: int = 0
    path: str = ""
    notice: str = ""


def look(graph: BlockGraph, disks: Iterable[AttachedDisk]) -> dict[str, Look]:
    """Look at each disk; returns what was seen, by the disk's name."""
    return {disk.name: _look_at(graph, disk) for disk in disks}


def _look_at(graph: BlockGraph, disk: AttachedDisk) -> Look:
    node = displaced.displacing(graph, disk)
    if node is not None:
        root = graph.under_device(disk.device) or node
        return Look(graph.size(root), graph.file(node), displaced.describe(graph, disk, node))
    path = disk.image.path if disk.image else ""
    return Look(graph.size(disk.identifiers.pivot), path, _still_open(graph, disk))


def _still_open(graph: BlockGraph, disk: AttachedDisk) -> str:
    """Which images the disk has left that are still open."""
    if not disk.closing:
        return ""
    paths = ", ".join(image.path or "the old image" for image in disk.closing)
    users = graph.users(nodes_of(disk))
    return f"QEMU still has {paths} open" + (f": used by {users}" if users else "")

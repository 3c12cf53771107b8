# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads the size, file and faults of each disk from QEMU's block graph, for lists of disks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from . import displaced
from .attached_disk import AttachedDisk
from .block_graph import BlockGraph, nodes_of


class DiskView(NamedTuple):
    """The state of a disk in QEMU.

    `size` is in bytes, as the guest sees it, and 0 for an optical drive without a medium. `path` is the file that the
    guest uses, if it is known. `notice` describes a fault, and is empty without one. `backing_files` are the images of
    snapshots below that file, from the top down.
    """

    size: int = 0
    path: str = ""
    notice: str = ""
    backing_files: tuple[str, ...] = ()


def view(graph: BlockGraph, disks: Iterable[AttachedDisk]) -> dict[str, DiskView]:
    """Return the state of each disk in QEMU, by the disk's name."""
    return {disk.name: _view(graph, disk) for disk in disks}


def _view(graph: BlockGraph, disk: AttachedDisk) -> DiskView:
    node = displaced.displacing(graph, disk)
    if node is not None:
        root = graph.under_device(disk.device) or node
        return DiskView(graph.size(root), graph.file(node), displaced.describe(graph, disk, node))
    path, *below = [image.path for image in disk.image.chain] if disk.image else [""]
    return DiskView(graph.size(disk.identifiers.pivot), path, _still_open(graph, disk), tuple(below))


def _still_open(graph: BlockGraph, disk: AttachedDisk) -> str:
    """Return the message about former images of the disk that QEMU has not closed, empty if there are none."""
    if not disk.closing:
        return ""
    paths = ", ".join(image.path or "the old image" for image in disk.closing)
    users = graph.users(nodes_of(disk))
    return f"QEMU still has {paths} open" + (f", used by {users}" if users else "")

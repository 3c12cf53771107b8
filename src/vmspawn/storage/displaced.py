# SPDX-License-Identifier: LGPL-2.1-or-later
"""Detects disks whose nodes a QMP client has replaced.

A QMP client can put other nodes below a device: `blockdev-mirror` with `job-complete` replaces the pivot, and
`blockdev-snapshot` puts a node above the pivot, or between the pivot and the image. The guest would then not notice a
change of the pivot or of the image.
"""

from __future__ import annotations

from ..errors import ConfigNotSupported
from .attached_disk import AttachedDisk
from .block_graph import BlockGraph
from .context import Context
from .image import Image


def displacing(graph: BlockGraph, attached: AttachedDisk) -> str | None:
    """Return the node that has replaced one of the disk's nodes, or None if all are in place."""
    root = graph.under_device(attached.device)
    if root is None or not attached.images:
        return None
    pivot = attached.identifiers.pivot
    if root != pivot:
        return root
    below = graph.under_node(pivot)
    image = next((each for each in attached.images if each.top_node == below), None)
    return below if image is None else _displacing_file(graph, image)


def _displacing_file(graph: BlockGraph, image: Image) -> str | None:
    if image.top_node == image.file_node:
        return None
    below = graph.under_node(image.format_node)
    return None if below == image.file_node else below


def describe(graph: BlockGraph, attached: AttachedDisk, node: str) -> str:
    """Return the message about a disk whose image was replaced by `node`."""
    return f"{attached.name} uses {graph.file(node)}, which a QMP client has put in the place of its image"


async def check(context: Context, attached: AttachedDisk) -> None:
    """Raise ConfigNotSupported if a node of the disk was replaced, or what `Monitor.execute` raises."""
    graph = await BlockGraph.take(context.monitor)
    node = displacing(graph, attached)
    if node is not None:
        raise ConfigNotSupported(
            describe(graph, attached, node), hint="change it through QMP, or detach the disk and attach that image"
        )

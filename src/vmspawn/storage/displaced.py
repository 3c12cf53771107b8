# SPDX-License-Identifier: LGPL-2.1-or-later
"""Notice disks that do not stand on their image any more.

Somebody with a QMP session can put other nodes under a device: `blockdev-mirror` with `job-complete` takes the place of
the pivot, and `blockdev-snapshot` goes on top of it or between it and the image. A change of the pivot or the image
would not reach the guest then.
"""

from __future__ import annotations

from ..errors import ConfigNotSupported
from .attached_disk import AttachedDisk
from .block_graph import BlockGraph
from .context import Context
from .image import Image


def displacing(graph: BlockGraph, attached: AttachedDisk) -> str | None:
    """The node that somebody put in the place of one of the disk's, or None if the disk stands on its image."""
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
    """What became of a disk that is displaced, for people."""
    return f"{attached.name} stands on {graph.file(node)}, which somebody put in the place of its image through QMP"


async def check(context: Context, attached: AttachedDisk) -> None:
    """Raise ConfigNotSupported if the disk does not stand on its image, or what `Monitor.execute` raises."""
    graph = await BlockGraph.take(context.monitor)
    node = displacing(graph, attached)
    if node is not None:
        raise ConfigNotSupported(
            describe(graph, attached, node), hint="change it through QMP, or detach it and attach what it stands on"
        )

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Handles QEMU's refusal to remove the nodes of a disk whose device is removed.

There are two cases:

1. A QMP client uses a node, by a job, an export or another node. The removal waits until that use ends.
2. QEMU 7.2 keeps the device, because plugging it in failed (docs/qemu.md, "A failed nvme device keeps its node"). The
   node stays until QEMU exits. So its image is replaced by one that fails every request, and the disk's name, place
   and image become free.
"""

from __future__ import annotations

from ..errors import QmpError, VmspawnError
from ..hotplug.qemu_objects import device_ids
from . import swap
from .attached_disk import AttachedDisk
from .block_graph import BlockGraph, nodes_of
from .context import Context
from .steps import IMAGE, LIMITS, PIVOT

#: Refusals after which QEMU is assumed to keep a device that was plugged in, or that an earlier manager attached.
_PATIENCE = 5


async def on_refused(context: Context, attached: AttachedDisk, error: VmspawnError) -> str:
    """Handle QEMU's refusal to remove a disk's part; returns the reason. Raises what `Monitor.execute` raises."""
    if not attached.has_device:
        graph = await BlockGraph.take(context.monitor)
        if users := graph.users(nodes_of(attached)):
            return f"it is used by {users}"
        is_kept = _may_be_kept(attached) and graph.is_kept(attached.identifiers.pivot, attached.device)
        if is_kept and attached.device not in await device_ids(context.monitor):
            await _abandon_nodes(context, attached)
    return error.description if isinstance(error, QmpError) else str(error)


def _may_be_kept(attached: AttachedDisk) -> bool:
    """Return whether QEMU may keep the device forever. A device that was plugged in may only need a moment."""
    refusals = attached.removal.refusals if attached.removal else 0
    return attached.has_failed or refusals >= _PATIENCE


async def _abandon_nodes(context: Context, attached: AttachedDisk) -> None:
    """Take the image away from a disk's nodes, and leave the nodes to QEMU."""
    async with attached.lock:
        await swap.take_away(context, attached)
        if attached.has_open_image:
            return
        attached.images.clear()
        attached.done = [name for name in attached.done if name not in (PIVOT, IMAGE, LIMITS)]

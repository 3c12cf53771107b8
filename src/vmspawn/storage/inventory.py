# SPDX-License-Identifier: LGPL-2.1-or-later
"""What of disks there is in a running QEMU, read back through its monitor (docs/qemu.md, "What can be read back")."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..hotplug.qemu_objects import children, device_ids
from ..qmp.monitor import Monitor
from .attached_disk import AttachedDisk
from .image import FAULT, Image


class Medium(NamedTuple):
    """What is in a disk: the node, if there is a medium, and whether the tray is open."""

    node: str
    tray_open: bool


class Inventory(NamedTuple):
    """Devices and objects by id, descriptor sets by number, and what each block node says that it stands on."""

    devices: frozenset[str]
    objects: frozenset[str]
    fdsets: frozenset[int]
    nodes: dict[str, str]
    media: dict[str, Medium]
    #: QEMU's BlockDeviceIoStatus of each device.
    io_status: dict[str, str]

    @classmethod
    async def take(cls, monitor: Monitor) -> Inventory:
        """Look at all of it. Raises what `Monitor.execute` raises."""
        fdsets = await monitor.execute("query-fdsets")
        nodes = await monitor.execute("query-named-block-nodes", {"flat": True})
        blocks = await monitor.execute("query-block")
        return cls(
            await device_ids(monitor),
            await children(monitor, "/objects"),
            frozenset(int(each["fdset-id"]) for each in fdsets),
            {str(each["node-name"]): str(each["file"]) for each in nodes if "node-name" in each},
            {str(each["qdev"]): _medium(each) for each in blocks if "qdev" in each},
            # virtio-blk is known by its path, the others by their id.
            {part: str(each.get("io-status", "ok")) for each in blocks for part in each.get("qdev", "").split("/")},
        )

    def medium(self, attachment: AttachedDisk) -> Medium:
        """What is in an optical drive."""
        return self.media.get(attachment.identifiers.device, Medium("", False))

    def image_under(self, attachment: AttachedDisk) -> Image | None:
        """Which of its images the disk's pivot stands on, or None if that cannot be told.

        QEMU 7.2 does not name a node's children, but it describes them down to the descriptor set, whose number is an
        image's own; what stands for an image that was taken away has none.
        """
        text = self.nodes.get(attachment.identifiers.pivot, "")
        for image in attachment.images:
            if uses_fdset(text, image.fdset):
                return image
        faults = [image for image in attachment.images if image.format == FAULT]
        return faults[0] if faults and "blkdebug" in text else None


def uses_fdset(text: str, number: int) -> bool:
    """Whether a node's description says that it stands on that descriptor set."""
    path = f"/dev/fdset/{number}"
    return text == path or f'{path}"' in text


def _medium(block: dict[str, Any]) -> Medium:
    return Medium(str(block.get("inserted", {}).get("node-name", "")), bool(block.get("tray_open")))

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads a running QEMU's devices, objects, descriptor sets and block nodes (docs/qemu.md, "What can be read back")."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..hotplug.qemu_objects import children, device_ids
from ..qmp.monitor import Monitor
from .attached_disk import AttachedDisk
from .image import FAULT, Image


class Medium(NamedTuple):
    """The medium of an optical drive: its node, empty without a medium, and whether the tray is open."""

    node: str
    is_tray_open: bool


class Inventory(NamedTuple):
    """QEMU's devices and objects by id, descriptor sets by number, and the description of each block node."""

    devices: frozenset[str]
    objects: frozenset[str]
    fdsets: frozenset[int]
    nodes: dict[str, str]
    media: dict[str, Medium]
    #: QEMU's BlockDeviceIoStatus of each device.
    io_status: dict[str, str]

    @classmethod
    async def take(cls, monitor: Monitor) -> Inventory:
        """Read the inventory. Raises what `Monitor.execute` raises."""
        fdsets = await monitor.execute("query-fdsets")
        nodes = await monitor.execute("query-named-block-nodes", {"flat": True})
        blocks = await monitor.execute("query-block")
        return cls(
            await device_ids(monitor),
            await children(monitor, "/objects"),
            frozenset(int(each["fdset-id"]) for each in fdsets),
            {str(each["node-name"]): str(each["file"]) for each in nodes if "node-name" in each},
            {str(each["qdev"]): _medium(each) for each in blocks if "qdev" in each},
            # QEMU reports virtio-blk by its path, and the other buses by the device's id.
            {part: str(each.get("io-status", "ok")) for each in blocks for part in each.get("qdev", "").split("/")},
        )

    def medium(self, attachment: AttachedDisk) -> Medium:
        """Return the medium of an optical drive."""
        return self.media.get(attachment.identifiers.device, Medium("", False))

    def image_under(self, attachment: AttachedDisk) -> Image | None:
        """Return the disk's image below its pivot, or None if it cannot be determined.

        QEMU 7.2 does not name a node's children, but its description of a node includes the number of the descriptor
        set, which identifies the image. An image that fails every request has no set, and is known by its driver.
        """
        text = self.nodes.get(attachment.identifiers.pivot, "")
        # The description of an overlay includes its base's descriptor set, so overlays are checked first.
        for image in sorted(attachment.images, key=lambda image: image.base is None):
            if uses_fdset(text, image.fdset):
                return image
        faults = [image for image in attachment.images if image.format == FAULT]
        return faults[0] if faults and "blkdebug" in text else None


def uses_fdset(text: str, number: int) -> bool:
    """Return whether a node's description includes that descriptor set."""
    path = f"/dev/fdset/{number}"
    return text == path or f'{path}"' in text


def _medium(block: dict[str, Any]) -> Medium:
    return Medium(str(block.get("inserted", {}).get("node-name", "")), bool(block.get("tray_open")))

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Describes the block nodes of a disk and their names.

The device is attached to a pivot: a throttle filter that keeps its name. Below the pivot is the image: a file node on a
descriptor set, and a format node above it unless the format is raw. blockdev-reopen puts another image, or a node
that fails every request, below the pivot while the guest writes. Limits are set on the pivot's throttle group.

Replacing an image needs a filter. A throttle filter costs 0.1 to 0.3 µs a request, as much as any other (QEMU 7.2 and
11.1, null-co). QEMU crashes if a throttle node is inserted later under a device with an I/O thread. Setting the
device's `drive` property would need no filter, but QEMU refuses that for a device with an I/O thread, and aborts if the
node does not change.
"""

from __future__ import annotations

from ..record import Record
from .disk import Disk
from .image import Image


class Identifiers(Record):
    """The names of one disk's parts in QEMU.

    `number` is fresh for every attach, so no name is used twice: QEMU may still have a device that it was asked to
    remove. Names are short, because QEMU takes 4.4 µs to read a byte. A disk `has_long_names` if a manager with
    version 1 or 2 of state.json attached it.
    """

    number: int
    has_long_names: bool = False

    @property
    def device(self) -> str:
        """The device's id in QEMU."""
        return f"drive{self.number}"

    @property
    def pivot(self) -> str:
        """The name of the node below the device."""
        return f"drive{self.number}-pivot" if self.has_long_names else self.device

    @property
    def limits(self) -> str:
        """The name of the throttle group."""
        return f"drive{self.number}-limits" if self.has_long_names else f"limits{self.number}"

    @property
    def thread(self) -> str:
        """The name of the I/O thread."""
        return f"drive{self.number}-thread"


def file_node(image: Image, disk: Disk) -> dict[str, object]:
    """Return the options of the image's lowest node, for blockdev-add and -blockdev alike (qapi/block-core.json)."""
    if image.backing is None:
        # With read-zeroes, a read never returns QEMU's memory.
        return {"driver": "null-co", "node-name": image.file_node, "size": image.size, "read-zeroes": True}
    options: dict[str, object] = {
        "driver": "host_device" if image.backing.is_block_device else "file",
        "node-name": image.file_node,
        "filename": f"/dev/fdset/{image.fdset}",
        **_unless_default(disk, read_only=not image.backing.is_writable),
    }
    if disk.cache == "none":
        options["cache"] = {"direct": True}
    if disk.aio != "threads":
        options["aio"] = disk.aio
    return options


def _unless_default(disk: Disk, *, read_only: bool) -> dict[str, object]:
    """Return the options that all nodes have, without QEMU's defaults: QEMU takes 4.4 µs to read a byte."""
    options: dict[str, object] = {}
    if read_only:
        options["read-only"] = True
    if disk.discard != "ignore":
        options["discard"] = disk.discard
    return options


def format_node(image: Image, disk: Disk) -> dict[str, object]:
    """Return the options of the format's node, or of the node that fails every request if the image has no file."""
    if image.backing is None:
        errors = [{"event": "none", "errno": 5, "once": False}]
        return {"driver": "blkdebug", "node-name": image.format_node, "image": image.file_node, "inject-error": errors}
    options: dict[str, object] = {
        "driver": image.format,
        "node-name": image.format_node,
        "file": image.file_node,
        **_unless_default(disk, read_only=not image.backing.is_writable),
    }
    if image.format in ("qcow2", "vmdk"):
        # This keeps QEMU from opening a backing file that the header names.
        options["backing"] = image.base.top_node if image.base is not None else None
    return options


def blank_node(identifiers: Identifiers) -> dict[str, object]:
    """Return the options of the blank node with which an empty optical drive is plugged in. It has the pivot's name."""
    return {"driver": "null-co", "node-name": identifiers.pivot, "size": 0, "read-only": True, "read-zeroes": True}


def pivot_node(identifiers: Identifiers, image: Image, disk: Disk, *, read_only: bool) -> dict[str, object]:
    """Return the options of the pivot. blockdev-reopen needs all of them again, with another file."""
    options: dict[str, object] = {
        "driver": "throttle",
        "node-name": identifiers.pivot,
        "throttle-group": identifiers.limits,
        "file": image.top_node,
        **_unless_default(disk, read_only=read_only),
    }
    if disk.detect_zeroes != "off":
        options["detect-zeroes"] = disk.detect_zeroes
    return options

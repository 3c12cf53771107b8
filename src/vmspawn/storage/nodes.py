# SPDX-License-Identifier: LGPL-2.1-or-later
"""The block nodes of a disk, and what they are called.

The device stands on a pivot: a throttle filter that never changes its name. Below it is the image: a file node on a
descriptor set, and the format above it unless that is raw. Another image, or errors, come under the pivot by
blockdev-reopen while the guest writes, and limits are set on the pivot's group.

A filter is needed for that, and this one costs 0.1 to 0.3 us a request, as much as any (QEMU 7.2 and 11.1, null-co). To
put a throttle node in later kills QEMU where the device has an I/O thread. To set the device's `drive` property instead
would need no filter, but QEMU refuses that with an I/O thread, and aborts if the node is the one that it has.
"""

from typing import NamedTuple

from .disk import Disk
from .image import Image


class Identifiers(NamedTuple):
    """The names of one attachment inside QEMU. `number` is fresh for every attachment, so none is ever used twice: QEMU
    may still know a device that it has been told to remove.

    They are short, for QEMU takes 4.4 us to read a byte. `long` names are those of disks that a manager attached whose
    state.json had version 1 or 2.
    """

    number: int
    long: bool = False

    @property
    def device(self) -> str:
        """The qdev id."""
        return f"drive{self.number}"

    @property
    def pivot(self) -> str:
        """The node that the device stands on."""
        return f"drive{self.number}-pivot" if self.long else self.device

    @property
    def limits(self) -> str:
        """The throttle group."""
        return f"drive{self.number}-limits" if self.long else f"limits{self.number}"

    @property
    def thread(self) -> str:
        """The I/O thread."""
        return f"drive{self.number}-thread"


def file_node(image: Image, disk: Disk) -> dict[str, object]:
    """The options of the node below the format, for blockdev-add and -blockdev alike (QEMU's qapi/block-core.json)."""
    if image.backing is None:
        # Read-zeroes, so that nothing of QEMU's memory could ever be read.
        return {"driver": "null-co", "node-name": image.file_node, "size": image.size, "read-zeroes": True}
    options: dict[str, object] = {
        "driver": "host_device" if image.backing.block else "file",
        "node-name": image.file_node,
        "filename": f"/dev/fdset/{image.fdset}",
        **_unless_default(disk, read_only=not image.backing.writable),
    }
    if disk.cache == "none":
        options["cache"] = {"direct": True}
    if disk.aio != "threads":
        options["aio"] = disk.aio
    return options


def _unless_default(disk: Disk, *, read_only: bool) -> dict[str, object]:
    """What every node is told of a disk. QEMU takes 4.4 us to read a byte, so what it assumes anyway is left out."""
    options: dict[str, object] = {}
    if read_only:
        options["read-only"] = True
    if disk.discard != "ignore":
        options["discard"] = disk.discard
    return options


def format_node(image: Image, disk: Disk) -> dict[str, object]:
    """The options of the format's node; of an image without a file, of the node that fails every request."""
    if image.backing is None:
        errors = [{"event": "none", "errno": 5, "once": False}]
        return {"driver": "blkdebug", "node-name": image.format_node, "image": image.file_node, "inject-error": errors}
    options: dict[str, object] = {
        "driver": image.format,
        "node-name": image.format_node,
        "file": image.file_node,
        **_unless_default(disk, read_only=not image.backing.writable),
    }
    if image.format in ("qcow2", "vmdk"):
        # Whatever the header names as a backing file, it is not opened.
        options["backing"] = None
    return options


def blank_node(identifiers: Identifiers) -> dict[str, object]:
    """The options of what stands in for the pivot of an optical drive that is to be empty."""
    return {"driver": "null-co", "node-name": identifiers.pivot, "size": 0, "read-only": True, "read-zeroes": True}


def pivot_node(identifiers: Identifiers, image: Image, disk: Disk, *, read_only: bool) -> dict[str, object]:
    """The options of the pivot. blockdev-reopen takes all of them again, with another file."""
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

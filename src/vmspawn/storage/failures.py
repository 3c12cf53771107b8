# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks that fail: QEMU's BLOCK_IO_ERROR in the words of disks (qapi/block-core.json).

QEMU reports none of NVMe disks; their guests see the errors and nobody else does (docs/qemu.md, "NVMe").
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ..qmp.events import Event
from .attached_disk import AttachedDisk

#: QEMU's event, and ours.
QEMU_EVENT = "BLOCK_IO_ERROR"
FAILED_EVENT = "StorageFailed"


class Failure(NamedTuple):
    """A request of the guest's that failed.

    `operation` is read or write, `reason` the host's, `action` what was done: report (the guest was told), stop (the
    guest stands still, and its request is tried again when it is resumed) or ignore.
    """

    operation: str
    reason: str
    no_space: bool
    action: str

    def __str__(self) -> str:
        what = "no space left on the host" if self.no_space else self.reason
        return f"{self.operation}: {what}" + (" (the guest was stopped)" if self.action == "stop" else "")


#: What is known of a disk for which the guest was stopped before this manager came, by QEMU's BlockDeviceIoStatus.
STOPPED = {
    "nospace": "no space left on the host (the guest was stopped)",
    "failed": "a request failed (the guest was stopped)",
}


def attachment_of(event: Event, attachments: Iterable[AttachedDisk]) -> AttachedDisk | None:
    """The disk that an event of QEMU's is about; it names the node on top, which is the pivot."""
    data = event.data or {}
    node = data.get("node-name")
    return next((each for each in attachments if each.identifiers.pivot == node), None)


def failure(event: Event) -> Failure:
    """What the event says."""
    data = event.data or {}
    return Failure(
        str(data.get("operation", "")),
        str(data.get("reason", "")),
        bool(data.get("nospace")),
        str(data.get("action", "")),
    )

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Translates QEMU's BLOCK_IO_ERROR into failures of disks (qapi/block-core.json).

QEMU reports no errors of NVMe disks; only their guests notice them (docs/qemu.md, "NVMe").
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ..qmp.events import Event
from .attached_disk import AttachedDisk

#: The names of QEMU's event and of vmspawn's event.
QEMU_EVENT = "BLOCK_IO_ERROR"
FAILED_EVENT = "StorageFailed"


class Failure(NamedTuple):
    """A guest's request that failed.

    `operation` is "read" or "write". `reason` is the host's error. `action` is the reaction: "report" (the guest gets
    the error), "stop" (the guest is stopped, and QEMU repeats the request when the guest is resumed) or "ignore".
    """

    operation: str
    reason: str
    is_out_of_space: bool
    action: str

    def to_event(self) -> dict[str, object]:
        """Return the failure as data of vmspawn's event."""
        return {
            "operation": self.operation,
            "reason": self.reason,
            "no_space": self.is_out_of_space,
            "action": self.action,
        }

    def __str__(self) -> str:
        what = "no space left on the host" if self.is_out_of_space else self.reason
        return f"{self.operation}: {what}" + (" (the guest was stopped)" if self.action == "stop" else "")


#: Descriptions of a failure that stopped the guest before this manager started, by QEMU's BlockDeviceIoStatus.
STOPPED = {
    "nospace": "no space left on the host (the guest was stopped)",
    "failed": "a request failed (the guest was stopped)",
}


def attachment_of(event: Event, attachments: Iterable[AttachedDisk]) -> AttachedDisk | None:
    """Return the disk whose pivot QEMU's event names, or None."""
    data = event.data or {}
    node = data.get("node-name")
    return next((each for each in attachments if each.identifiers.pivot == node), None)


def failure(event: Event) -> Failure:
    """Return the failure that the event reports."""
    data = event.data or {}
    return Failure(
        str(data.get("operation", "")),
        str(data.get("reason", "")),
        bool(data.get("nospace")),
        str(data.get("action", "")),
    )

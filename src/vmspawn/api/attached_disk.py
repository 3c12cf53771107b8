# SPDX-License-Identifier: LGPL-2.1-or-later
"""A machine's disks as the API returns them."""

from __future__ import annotations

from typing import NamedTuple

from ..storage import attached_disk
from ..storage.limits import Limits
from ..storage.looks import Look


class AttachedDisk(NamedTuple):
    """A disk that is attached.

    `by_id` is its stable path in the guest, `place` its port, slot, SCSI address or namespace.
    """

    name: str
    bus: str
    format: str
    read_only: bool
    serial: str
    by_id: str
    place: str


class DiskStatus(NamedTuple):
    """What a disk is doing.

    `size` is in bytes; an optical drive without a medium has 0. `state` is attaching, attached or detaching. `path` is
    that of the file that the guest works on, as far as it is known. `failures` counts requests of the guest that
    failed. `notice` says what is not as it should be, such as a file that somebody put in the place of the image
    through QMP.
    """

    disk: AttachedDisk
    size: int
    state: str
    is_boot: bool
    path: str | None
    limits: Limits
    failures: int
    last_failure: str | None
    notice: str | None


def describe(attached: attached_disk.AttachedDisk) -> AttachedDisk:
    """A disk of a machine of this process."""
    return AttachedDisk(
        attached.name,
        attached.disk.bus,
        attached.format,
        attached.read_only,
        attached.serial,
        attached.by_id,
        str(attached.place),
    )


def describe_status(attached: attached_disk.AttachedDisk, look: Look) -> DiskStatus:
    """What a disk of a machine of this process is doing."""
    return DiskStatus(
        describe(attached),
        look.size,
        attached.state.value,
        attached.boot,
        look.path or None,
        attached.limits,
        attached.failures,
        attached.last_failure or None,
        look.notice or None,
    )

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the library's types for attached disks."""

from __future__ import annotations

from typing import NamedTuple

from ..storage import attached_disk
from ..storage.disk_views import DiskView
from ..storage.limits import Limits


class AttachedDisk(NamedTuple):
    """An attached disk.

        attached = await machine.attach("data.raw")
        await machine.run(["mkfs.ext4", attached.by_id])

    `by_id` is the disk's stable path in the guest. `place` is its port, slot, SCSI address or namespace.
    """

    name: str
    bus: str
    format: str
    read_only: bool
    serial: str
    by_id: str
    place: str


class DiskStatus(NamedTuple):
    """The status of a disk.

        for status in await machine.disks():
            print(status.disk.name, status.size, status.state)

    `size` is in bytes, or 0 for an optical drive without a medium. `state` is attaching, attached or detaching. `path`
    is the path of the file that the guest uses, if it is known. `failures` counts failed requests of the guest.
    `notice` reports an irregularity, such as another file that a QMP client put in place of the image. `device` is the
    id of the device in QEMU, `node` the block node of the image; `replace` changes the node. `backing_files` are the
    images of snapshots below `path`, from the top down.
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
    device: str
    node: str | None
    backing_files: tuple[str, ...] = ()


def describe(attached: attached_disk.AttachedDisk) -> AttachedDisk:
    """Describe a disk of a machine that this process manages."""
    return AttachedDisk(
        attached.name,
        attached.disk.bus,
        attached.format,
        attached.read_only,
        attached.serial,
        attached.by_id,
        str(attached.place),
    )


def describe_status(attached: attached_disk.AttachedDisk, view: DiskView) -> DiskStatus:
    """Describe the status of a disk of a machine that this process manages."""
    return DiskStatus(
        describe(attached),
        view.size,
        attached.state.value,
        attached.is_boot,
        view.path or None,
        attached.limits,
        attached.failures,
        attached.last_failure or None,
        view.notice or None,
        attached.device,
        attached.node or None,
        view.backing_files,
    )

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Converts disks and their options from and to the types of `io.vmspawn.Machine`.

Names are in Varlink's case because they are part of the protocol.
"""

import typing

from ..storage.attached_disk import AttachedDisk
from ..storage.buses import TABLE
from ..storage.disk import Disk
from ..storage.disk_views import DiskView
from ..storage.limits import NO_LIMITS, Limits
from ..storage.statistics import Statistics
from .types import varlink_type

# asyncvarlink evaluates annotations, so this module cannot use `from __future__ import annotations`.


@varlink_type
class StorageLimits:
    """Limits in requests and bytes per second; 0 and null mean unlimited.

    `burstPercent` is the percentage of the limits that the guest may reach for a second after an idle time.
    """

    iops: int | None = None
    iopsRead: int | None = None
    iopsWrite: int | None = None
    bps: int | None = None
    bpsRead: int | None = None
    bpsWrite: int | None = None
    burstPercent: int | None = None


@varlink_type
class StorageStatistics:
    """The guest's requests, their bytes and their duration, since the disk was attached."""

    reads: int
    writes: int
    flushes: int
    readBytes: int
    writtenBytes: int
    readUSec: int
    writeUSec: int
    failed: int


@varlink_type
class StorageRemoval:
    """A pending removal: its duration, the number of requests to the guest, and the reason why it has not completed.

    `forced` is true if the image was taken away before the guest released the device.
    """

    pendingUSec: int
    requests: int
    reason: str
    forced: bool
    answer: str | None


@varlink_type
class Storage:
    """A disk. `state` is attaching, attached or detaching; `place` is its port, slot, SCSI address or namespace.

    An optical drive without a medium has a size of 0 and no node. `device` is the id of the device in QEMU, `node` the
    block node of the image; `ReplaceStorage` changes the node. `failures` counts failed requests of the guest. `notice`
    reports another file that a QMP client put in place of the image, or a replaced image that is still open.
    `backingFiles` are the images of snapshots below `path`, from the top down.
    """

    name: str
    bus: str
    format: str
    readOnly: bool
    sizeBytes: int
    serial: str
    byId: str
    place: str
    device: str
    node: str | None
    boot: bool
    state: str
    path: str | None
    limits: StorageLimits | None
    onError: str
    failures: int
    lastFailure: str | None
    removal: StorageRemoval | None
    statistics: StorageStatistics | None
    notice: str | None
    backingFiles: list[str]


def to_limits(found: StorageLimits | None) -> Limits:
    """Return the limits that a client requests."""
    if found is None:
        return NO_LIMITS
    return Limits(
        found.iops or 0,
        found.iopsRead or 0,
        found.iopsWrite or 0,
        found.bps or 0,
        found.bpsRead or 0,
        found.bpsWrite or 0,
        1.0 if found.burstPercent is None else found.burstPercent / 100,
    )


def _from_limits(limits: Limits) -> StorageLimits | None:
    return StorageLimits(*limits[:6], round(limits.burst * 100)) if limits.has_any else None


def describe(attachment: AttachedDisk, view: DiskView, why: str, statistics: Statistics | None) -> Storage:
    """Describe a disk for a Varlink client."""
    return Storage(
        name=attachment.name,
        bus=attachment.disk.bus,
        format=attachment.format,
        readOnly=attachment.read_only,
        sizeBytes=view.size,
        serial=attachment.serial,
        byId=attachment.by_id,
        place=str(attachment.place),
        device=attachment.device,
        node=attachment.node or None,
        boot=attachment.is_boot,
        state=attachment.state.value,
        path=view.path or None,
        limits=_from_limits(attachment.limits),
        onError=attachment.disk.on_error or ("enospc" if TABLE[attachment.disk.bus].can_stop_guest else "report"),
        failures=attachment.failures,
        lastFailure=attachment.last_failure or None,
        removal=_removal(attachment, why),
        statistics=_statistics(statistics) if statistics else None,
        notice=view.notice or None,
        backingFiles=list(view.backing_files),
    )


def _removal(attachment: AttachedDisk, why: str) -> StorageRemoval | None:
    removal = attachment.removal
    if removal is None:
        return None
    microseconds = int(removal.seconds * 1_000_000)
    return StorageRemoval(microseconds, removal.requests, why, attachment.is_forced, removal.answer or None)


def _statistics(found: Statistics) -> StorageStatistics:
    return StorageStatistics(
        reads=found.reads,
        writes=found.writes,
        flushes=found.flushes,
        readBytes=found.read_bytes,
        writtenBytes=found.written_bytes,
        readUSec=found.read_time // 1000,
        writeUSec=found.write_time // 1000,
        failed=found.failed,
    )


def with_options(disk: Disk, **options: typing.Any) -> Disk:
    """Return the disk with the options that are not None."""
    return disk._replace(**{name: value for name, value in options.items() if value is not None})

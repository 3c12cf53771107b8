# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads the I/O statistics of disks (QEMU's query-blockstats)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from .attached_disk import AttachedDisk
from .context import Context


class Statistics(NamedTuple):
    """The guest's requests and bytes since the disk was attached, and the duration of the requests in nanoseconds."""

    reads: int
    writes: int
    flushes: int
    read_bytes: int
    written_bytes: int
    read_time: int
    write_time: int
    failed: int


async def read(context: Context, attachments: Iterable[AttachedDisk]) -> dict[str, Statistics]:
    """Return the statistics of each disk by name, without disks that are being attached or detached."""
    found: list[dict[str, Any]] = await context.monitor.execute("query-blockstats")
    # `qdev` is the path of a child of the device for virtio-blk, and the device's id alone for the other buses
    # (docs/qemu.md, "What can be read back").
    by_device = {part: each["stats"] for each in found for part in each.get("qdev", "").split("/")}
    return {
        attachment.name: _statistics(by_device[attachment.identifiers.device])
        for attachment in attachments
        if attachment.identifiers.device in by_device
    }


def _statistics(stats: dict[str, Any]) -> Statistics:
    return Statistics(
        reads=stats["rd_operations"],
        writes=stats["wr_operations"],
        flushes=stats["flush_operations"],
        read_bytes=stats["rd_bytes"],
        written_bytes=stats["wr_bytes"],
        read_time=stats["rd_total_time_ns"],
        write_time=stats["wr_total_time_ns"],
        failed=stats["failed_rd_operations"] + stats["failed_wr_operations"] + stats["failed_flush_operations"],
    )

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Explains why QEMU ended before it was up."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import StartError
from ..text import printable
from .boot_disk import BootDisk


def explain_failure(machine: str, disks: Iterable[BootDisk], end: str, log: str) -> StartError:
    """Return the error for QEMU's end, with the first line of its log that is not a warning.

    Names the disk that the log mentions.
    """
    lines = [line for line in log.strip().splitlines() if line.strip() and "warning:" not in line]
    if not lines:
        return StartError(f"QEMU {end} immediately, without a message", hint="check whether another program kills it")
    blamed = next((each for each in disks if _mentions(log, each)), None)
    if "lock" in log and "Failed to get" in log and blamed is not None:
        return StartError(
            f"cannot use {blamed.disk.path}: {_holder(machine, blamed)} uses the image (QEMU could not lock it)",
            hint="shut down the other machine, or use a copy of the image",
        )
    first = printable(lines[0])
    message = first.partition("qemu-system-")[2].partition(": ")[2] or first
    if blamed is not None:
        message = f"{blamed.disk.path}: {message.rpartition('}: ')[2]}"
    return StartError(f"QEMU could not start: {message}")


def _holder(machine: str, disk: BootDisk) -> str:
    """Describe the process that holds the lock on a disk's image."""
    # Imported here, because most starts succeed.
    from ..storage.holders import holder_of

    backing = disk.image.backing if disk.image is not None else None
    return (holder_of(backing.identity, ours=machine) if backing is not None else "") or "another process"


def _mentions(log: str, each: BootDisk) -> bool:
    names = [each.identifiers.pivot]
    for image in (image for top in each.images for image in top.chain):
        names += [image.file_node, image.format_node, f"fdset/{image.fdset}"]
    return any(re.search(rf"\b{re.escape(name)}\b", log) for name in names)


def no_answer(name: str, pid: int, trouble: str) -> StartError:
    """Return the error for a QEMU that does not answer because its process is stopped or blocked."""
    return StartError(
        f"QEMU does not answer: process {pid} {trouble}",
        hint=f"let it continue (kill -CONT {pid}), or end it: vmctl terminate {name}",
    )

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Removes snapshots on request. After a machine's last snapshot, writes the machine's overlays to the images below.

This module is on vmctl's start path and imports next to nothing.
"""

from __future__ import annotations

from contextlib import closing

from ..errors import SnapshotInUse
from . import directory
from .directory import CURRENT, OpenSnapshot


def remove(full_name: str) -> None:
    """Remove a snapshot, and write overlays to the images below if no snapshot needs these images any more.

    For MACHINE@current, writes the overlays to the images, which may take minutes; a copy's overlays are deleted.

    Raises NoSuchSnapshot, SnapshotInUse, StartError; SystemFailure if the snapshot was removed and overlays
    cannot be written, or Cancelled if the work of this thread is cancelled meanwhile.
    """
    from . import merge

    machine, _, name = full_name.partition("@")
    directory.check_discards_nothing(full_name)
    with closing(OpenSnapshot(full_name)) as snapshot:
        can_be_merged = name == CURRENT and merge.can_be_merged(snapshot.manifest)
    if can_be_merged:
        if not merge.merge(machine):
            raise SnapshotInUse(
                f"{full_name} is in use, and cannot be written to the disks now",
                hint="end the machines that use it, and remove the snapshots that need its images",
            )
        return
    directory.remove(full_name)
    failures = merge.after_end(machine)
    if failures:
        failures[0].prefix(f"removed {full_name}, but ")
        raise failures[0]

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Names copies of machines. Managers import this module instead of `fork`, which starts the copies."""

from __future__ import annotations

import itertools
import os

from ..errors import SnapshotExists
from ..host import runtime
from ..images import snapshot_files


def free_name(machine: str) -> str:
    """Return a name for a copy that no machine has, and no copy whose disks were kept."""
    taken = set(runtime.machine_names())
    stem = machine[: runtime.NAME_MAX - 8]
    names = (f"{stem}-fork{number}" for number in itertools.count(1))
    return next(
        name for name in names if name not in taken and not os.path.lexists(snapshot_files.current_folder(name))
    )


def name_in_use(name: str) -> SnapshotExists:
    """Return the error for a copy with `keep_disks` if an earlier machine of the same name has kept its disks."""
    kept = os.path.basename(snapshot_files.current_folder(name))
    return SnapshotExists(
        f"{kept} has the disks of an earlier machine {name}",
        hint=f"choose another name for the copy, or remove these disks: vmctl remove-snapshot {kept}",
    )

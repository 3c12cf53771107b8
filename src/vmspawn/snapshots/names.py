# SPDX-License-Identifier: LGPL-2.1-or-later
"""Names copies of machines. Managers import this module instead of `fork`, which starts the copies."""

from __future__ import annotations

from ..host import runtime


def free_name(machine: str) -> str:
    """Return a name for a copy that no machine has."""
    taken = set(runtime.machine_names())
    stem = machine[: runtime.NAME_MAX - 8]
    return next(name for n in range(1, len(taken) + 2) if (name := f"{stem}-fork{n}") not in taken)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest's memory: its size, how far it can grow, and the backend that other processes can share."""

from __future__ import annotations

from typing import NamedTuple

from ..errors import UsageError
from .extras import Extras

#: The slots for memory that is plugged in later, if a maximum is given and no number; as systemd-vmspawn.
SLOTS_DEFAULT = 1
_SLOTS_MAX = 256


class Growth(NamedTuple):
    """How far the guest's memory may grow while it runs: to `maximum` bytes in all, by `slots` modules."""

    maximum: int
    slots: int = SLOTS_DEFAULT


def check(size: int, growth: Growth | None) -> None:
    """Raise UsageError for a growth that cannot be."""
    if growth is None:
        return
    if growth.maximum <= size:
        raise UsageError(
            f"--ram= has a maximum of {growth.maximum} bytes, which is no more than its size of {size}",
            hint="write --ram=SIZE:MAX with a larger MAX, or --ram=SIZE",
        )
    if not 1 <= growth.slots <= _SLOTS_MAX:
        raise UsageError(f"--ram= has {growth.slots} slots", hint=f"use 1 to {_SLOTS_MAX}")


def size_argument(size: int, growth: Growth | None) -> str:
    """The value of QEMU's -m."""
    if growth is None:
        return f"size={size}B"
    return f"size={size}B,maxmem={growth.maximum}B,slots={growth.slots}"


def shared(size: int) -> Extras:
    """Let other processes map the guest's memory, as vhost-user devices do."""
    backend = f"memory-backend-memfd,id=mem,size={size}B,share=on"
    return Extras(machine=("memory-backend=mem",), arguments=("-object", backend))

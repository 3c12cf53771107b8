# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checks the size and growth of the guest's memory, and writes QEMU's arguments for it."""

from __future__ import annotations

from ..errors import UsageError
from ..record import Record
from .extras import Extras

#: The number of slots for hot-plugged memory if the user sets only a maximum, as in systemd-vmspawn.
SLOTS_DEFAULT = 1
_SLOTS_MAX = 256


class Growth(Record):
    """The growth of the guest's memory at run time: up to `maximum` bytes in total, by up to `slots` modules."""

    maximum: int
    slots: int = SLOTS_DEFAULT


def check(size: int, growth: Growth | None) -> None:
    """Raise UsageError for a growth that is out of range."""
    if growth is None:
        return
    if growth.maximum <= size:
        raise UsageError.with_fields(
            "{ram_growth=} has a maximum of {maximum} bytes, which is no more than the size of {size}",
            hint="use a larger maximum, or leave it out",
            maximum=growth.maximum,
            size=size,
        )
    if not 1 <= growth.slots <= _SLOTS_MAX:
        raise UsageError.with_fields(
            "{ram_growth=} has {count} slots", hint="use 1 to {most}", count=growth.slots, most=_SLOTS_MAX
        )


def size_argument(size: int, growth: Growth | None) -> str:
    """Return the value of QEMU's -m."""
    if growth is None:
        return f"size={size}B"
    return f"size={size}B,maxmem={growth.maximum}B,slots={growth.slots}"


def shared(size: int) -> Extras:
    """Return the arguments that let other processes map the guest's memory, as vhost-user devices do."""
    backend = f"memory-backend-memfd,id=mem,size={size}B,share=on"
    return Extras(machine=("memory-backend=mem",), arguments=("-object", backend))

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines a disk's I/O limits, which QEMU's throttle groups enforce (QEMU's docs/throttle.txt)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from ..errors import BadConfig
from ..record import Record
from ..text import short_repr

#: QEMU's limit (include/qemu/throttle.h, THROTTLE_VALUE_MAX).
LIMIT_MAX = 10**15

#: The largest `burst`; with a larger factor, the limits would have no effect in practice.
BURST_MAX = 1000


class Limits(Record):
    """Limits on requests and bytes per second; 0 means unlimited.

        await machine.limit("data", Limits(iops=500, bps=10 << 20, burst=2))

    `burst` is a factor: after an idle time, the guest may exceed the limits by that factor for a second.
    """

    iops: int = 0
    iops_read: int = 0
    iops_write: int = 0
    bps: int = 0
    bps_read: int = 0
    bps_write: int = 0
    burst: float = 1.0

    def __repr__(self) -> str:
        return short_repr(self)

    @property
    def has_any(self) -> bool:
        """True if any limit is set."""
        return any(self[:6])

    def to_qemu(self) -> dict[str, object]:
        """Return all fields of QEMU's ThrottleLimits, so that former limits are reset (qapi/block-core.json)."""
        found: dict[str, object] = {}
        for name, value in zip(_QEMU_NAMES, self[:6], strict=True):
            found[name] = value
            found[f"{name}-max"] = int(value * self.burst) if self.burst > 1 else 0
        return found

    @classmethod
    def from_qemu(cls, found: Mapping[str, int]) -> Self:
        """Return the limits of a throttle group, from its property `limits`."""
        values = [int(found[name]) for name in _QEMU_NAMES]
        bursts = (
            round(found[f"{name}-max"] / value, 2) for name, value in zip(_QEMU_NAMES, values, strict=True) if value
        )
        return cls(*values)._replace(burst=max((1.0, *bursts)))

    def __str__(self) -> str:
        words = [
            f"{name.replace('_', '-')} {value}" for name, value in zip(self._fields[:6], self[:6], strict=True) if value
        ]
        if words and self.burst > 1:
            words.append(f"burst {self.burst:g}")
        return ", ".join(words)


#: The limits of an unlimited disk.
NO_LIMITS = Limits()

_QEMU_NAMES = ("iops-total", "iops-read", "iops-write", "bps-total", "bps-read", "bps-write")


def check_limits(limits: Limits) -> Limits:
    """Return the limits if QEMU supports them. Raises BadConfig if not."""
    for name, value in zip(limits._fields[:6], limits[:6], strict=True):
        if not 0 <= value <= LIMIT_MAX:
            raise BadConfig(f"the limit {name.replace('_', '-')} of {value} is out of range", hint="0 means unlimited")
    for what, total, parts in (("iops", limits.iops, limits[1:3]), ("bps", limits.bps, limits[4:6])):
        if total and any(parts):
            raise BadConfig(
                f"{what} and {what}-read or {what}-write exclude each other",
                hint=f"set only {what}, or only its parts",
            )
    if not 1 <= limits.burst <= BURST_MAX:
        raise BadConfig(f"a burst of {limits.burst:g} is out of range", hint=f"use 1 to {BURST_MAX} times the limits")
    return limits

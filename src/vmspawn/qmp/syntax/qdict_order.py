# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sorts the members of an object in the order of QEMU's hash table (qobject/qdict.c, tdb_hash)."""

from __future__ import annotations

from collections.abc import Iterable

_BUCKETS = 512


def by_bucket(keys: Iterable[str]) -> list[str]:
    """Return keys in QEMU's order. `keys` are in the order of the message."""
    # QEMU puts a key before the earlier keys of its bucket, and sorting keeps the order of equal keys.
    return sorted(reversed(list(keys)), key=_bucket)  # noqa: C414


def _bucket(key: str) -> int:
    data = key.encode().replace(b"\0", b"\xc0\x80")
    value = 0x238F13AF * len(data)
    for position, byte in enumerate(data):
        value += byte << position * 5 % 24
    return (1103515243 * value + 12345) % (1 << 32) % _BUCKETS

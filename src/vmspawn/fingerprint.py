# SPDX-License-Identifier: LGPL-2.1-or-later
"""Computes fingerprints, by which the cache names its entries.

The remainder by a prime distinguishes contents well enough. Importing hashlib takes longer than computing a
fingerprint, and loads OpenSSL, which would stay in each manager's memory.
"""

from __future__ import annotations

from collections.abc import Iterable

_PRIME = 2**64 - 59


def fingerprint_files(paths: Iterable[str], value: int = 0) -> str:
    """Return 16 hexadecimal digits for a number and the content of files, in their order."""
    for path in paths:
        with open(path, "rb") as file:
            value = _remainder(b"%x %b" % (value, file.read()))
    return f"{value:016x}"


def fingerprint_strings(strings: Iterable[str]) -> str:
    """Return 16 hexadecimal digits for strings, in their order."""
    return f"{_remainder(chr(0).join(strings).encode()):016x}"


def _remainder(content: bytes) -> int:
    return int.from_bytes(content, "big") % _PRIME

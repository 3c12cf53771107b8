# SPDX-License-Identifier: LGPL-2.1-or-later
"""Names the content of files, for what the cache keeps.

The remainder by a prime tells contents apart well enough. hashlib takes longer to import than all of this, and it loads
OpenSSL, which would stay in each manager's memory.
"""

from __future__ import annotations

from collections.abc import Iterable

_PRIME = 2**64 - 59


def fingerprint_files(paths: Iterable[str], value: int = 0) -> str:
    """Return 16 hexadecimal digits for a number and the content of files, in their order."""
    for path in paths:
        with open(path, "rb") as file:
            value = int.from_bytes(b"%x %b" % (value, file.read()), "big") % _PRIME
    return f"{value:016x}"

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Parses sizes with units: `512M`, `2G`, `1.5GB`.

Python's `int` and `float` accept texts that users do not mean as numbers: `4_0`, digits of other scripts, `1e3`, `nan`.
"""

from __future__ import annotations

import re

#: The maximum size of a file (off_t).
_SIZE_MAX = (1 << 63) - 1

_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

# Users write both "2GB" and "2G".
_SIZE = r"([0-9]{0,30})(?:\.([0-9]{1,30}))?(?:([KMGTkmgt])[Bb]?|[Bb])?"

SIZE_HINT = "write for example 512M or 2G"


def bytes_of(text: str) -> int | None:
    """Parse a size with an optional suffix B, K, M, G or T (powers of 1024), as systemd does.

    Returns None if the text is not a size.
    """
    found = re.fullmatch(_SIZE, text)
    if not found or not (found[1] or found[2]):
        return None
    whole, fraction = found[1] or "0", found[2] or ""
    unit = _UNITS[(found[3] or "").upper()]
    size: int = int(whole + fraction) * unit // 10 ** len(fraction)
    return size if size <= _SIZE_MAX else None

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What kind of file a kernel is: UEFI can start a PE image, and nothing else a unified kernel image (UKI)."""

from __future__ import annotations

import struct

# The PE format: offset of the PE header in the DOS header; the COFF header behind the signature; the section table.
_PE_OFFSET = struct.Struct("<60xI")
_COFF = struct.Struct("<4s2xH12xH2x")
_SECTION = struct.Struct("<8s32x")

_SECTIONS_MAX = 96

OTHER = "other"
PE = "pe"
UKI = "uki"


def kind_of(path: str) -> str:
    """UKI, PE or OTHER. Raises OSError."""
    with open(path, "rb") as file:
        start = file.read(_PE_OFFSET.size)
        if start[:2] != b"MZ" or len(start) < _PE_OFFSET.size:
            return OTHER
        file.seek(_PE_OFFSET.unpack(start)[0])
        header = file.read(_COFF.size)
        if len(header) < _COFF.size:
            return OTHER
        signature, sections, optional_size = _COFF.unpack(header)
        if signature != b"PE\0\0":
            return OTHER
        file.seek(optional_size, 1)
        table = file.read(min(sections, _SECTIONS_MAX) * _SECTION.size)
    names = {table[at : at + 8].rstrip(b"\0") for at in range(0, len(table) - 7, _SECTION.size)}
    return UKI if {b".linux", b".osrel"} <= names else PE

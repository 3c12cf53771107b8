# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tell what can start a kernel: QEMU itself, UEFI, or both.

QEMU starts what follows Linux's boot protocol. UEFI starts PE images, which most of today's kernels are as well.
Unified kernel images (UKI), compressed EFI kernels of aarch64 and other EFI programs are PE images only.
"""

from __future__ import annotations

import struct

# The PE format: offset of the PE header in the DOS header; the COFF header behind the signature; the section table.
_PE_OFFSET = struct.Struct("<60xI")
_COFF = struct.Struct("<4s2xH12xH2x")
_SECTION = struct.Struct("<8s32x")

_SECTIONS_MAX = 96

# Where a kernel of Linux says so: x86's boot protocol ("The Real-Mode Kernel Header"), arm64's booting.rst.
_LINUX_MAGICS = ((0x202, b"HdrS"), (56, b"ARM\x64"))
_START_SIZE = 0x206

#: No PE image: QEMU alone can start it.
OTHER = "other"
#: A kernel that QEMU and UEFI can start.
LINUX = "linux"
#: A unified kernel image, for UEFI alone.
UKI = "uki"
#: Another PE image, for UEFI alone.
EFI = "efi"

NEED_UEFI = (UKI, EFI)


def kind_of(path: str) -> str:
    """Return OTHER, LINUX, UKI or EFI. Raises OSError."""
    with open(path, "rb") as file:
        start = file.read(_START_SIZE)
        if start[:2] != b"MZ" or len(start) < _PE_OFFSET.size:
            return OTHER
        file.seek(_PE_OFFSET.unpack_from(start)[0])
        header = file.read(_COFF.size)
        if len(header) < _COFF.size:
            return OTHER
        signature, sections, optional_size = _COFF.unpack(header)
        if signature != b"PE\0\0":
            return OTHER
        file.seek(optional_size, 1)
        table = file.read(min(sections, _SECTIONS_MAX) * _SECTION.size)
    names = {table[at : at + 8].rstrip(b"\0") for at in range(0, len(table) - 7, _SECTION.size)}
    if {b".linux", b".osrel"} <= names:
        return UKI
    return LINUX if any(start.startswith(magic, at) for at, magic in _LINUX_MAGICS) else EFI

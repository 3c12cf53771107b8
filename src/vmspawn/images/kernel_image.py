# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds out whether QEMU, UEFI or both can start a kernel, and reads the kernel's architecture and version.

QEMU starts kernels that follow Linux's boot protocol. UEFI starts PE images. Both can start most of today's kernels.
Unified kernel images (UKI), compressed EFI kernels of aarch64 and other EFI programs are PE images only.
"""

from __future__ import annotations

import os
import struct

# The PE format: the offset of the PE header; the signature and COFF header there; an entry of the section table.
_PE_OFFSET = struct.Struct("<60xI")
_COFF = struct.Struct("<4sHH12xH2x")
_MACHINES = {0x8664: "x86_64", 0xAA64: "aarch64"}
_SECTION = struct.Struct("<8s32x")

_SECTIONS_MAX = 96

# x86's boot protocol: the header has the offset of the version's text, counted from the end of the first sector.
_VERSION_OFFSET = struct.Struct("<H")
_VERSION_FIELD, _SECTOR, _VERSION_MAX = 0x20E, 0x200, 256

# Offsets and magic numbers of Linux: x86's boot protocol ("The Real-Mode Kernel Header"), and arm64's booting.rst.
_LINUX_MAGICS = ((0x202, b"HdrS"), (56, b"ARM\x64"))
_START_SIZE = 0x206

#: In a file of several initramfs archives, each begins at a multiple of this number of bytes (buffer-format.rst).
INITRD_ALIGNMENT = 4

#: Not a PE image: only QEMU can start it.
OTHER = "other"
#: A kernel that QEMU and UEFI can start.
LINUX = "linux"
#: A unified kernel image: only UEFI can start it.
UKI = "uki"
#: Another PE image: only UEFI can start it.
EFI = "efi"

NEED_UEFI = (UKI, EFI)


def kind_of(path: str) -> str:
    """Return the kind of a kernel: OTHER, LINUX, UKI or EFI. Raises OSError if the file cannot be read."""
    with open(path, "rb") as file:
        start = file.read(_START_SIZE)
        if start[:2] != b"MZ" or len(start) < _PE_OFFSET.size:
            return OTHER
        file.seek(_PE_OFFSET.unpack_from(start)[0])
        header = file.read(_COFF.size)
        if not _is_coff(header):
            return OTHER
        _, _, sections, optional_size = _COFF.unpack(header)
        file.seek(optional_size, 1)
        table = file.read(min(sections, _SECTIONS_MAX) * _SECTION.size)
    names = {table[at : at + 8].rstrip(b"\0") for at in range(0, len(table) - 7, _SECTION.size)}
    if {b".linux", b".osrel"} <= names:
        return UKI
    return LINUX if any(start.startswith(magic, at) for at, magic in _LINUX_MAGICS) else EFI


def _is_coff(header: bytes) -> bool:
    return len(header) == _COFF.size and header.startswith(b"PE\0\0")


def architecture_of(path: str) -> str:
    """Return the architecture of a PE image in the kernel's spelling, or an empty string if it is unknown.

    Raises OSError if the file cannot be read.
    """
    with open(path, "rb") as file:
        start = file.read(_PE_OFFSET.size)
        if start[:2] != b"MZ" or len(start) < _PE_OFFSET.size:
            return ""
        file.seek(_PE_OFFSET.unpack(start)[0])
        header = file.read(_COFF.size)
    return _MACHINES.get(_COFF.unpack(header)[1], "") if _is_coff(header) else ""


def version_of(path: str) -> str:
    """Return the version of an x86 kernel, such as 6.1.0-37-amd64, or an empty string if the image has none.

    Raises OSError if the file cannot be read.
    """
    with open(path, "rb") as file:
        start = file.read(_VERSION_FIELD + _VERSION_OFFSET.size)
        if not start.startswith(b"HdrS", _SECTOR + 2) or len(start) < _VERSION_FIELD + _VERSION_OFFSET.size:
            return ""
        (offset,) = _VERSION_OFFSET.unpack_from(start, _VERSION_FIELD)
        if not offset:
            return ""
        file.seek(offset + _SECTOR)
        words = file.read(_VERSION_MAX).partition(b"\0")[0].split()
    return os.fsdecode(words[0]) if words and b"/" not in words[0] else ""

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Recognizes a disk image's container format by its signature.

A container format does not store the disk's data in the order in which the guest reads it. Partition tables, file
systems, ISO 9660 and LUKS are contents of a raw disk, and are not container formats.
"""

from __future__ import annotations

import re
from collections.abc import Callable

#: A function that reads `length` bytes at `offset`, or fewer at the end of the image.
Read = Callable[[int, int], bytes]

_SECTOR = 512

#: QEMU's name of the format, the offset of the signature, and the signature. The first match counts.
_SIGNATURES = (
    ("qcow", 0, b"QFI\xfb\0\0\0\x01"),
    ("qcow2", 0, b"QFI\xfb"),
    ("qed", 0, b"QED\0"),
    # The sparse extents of VMware Workstation, of ESX, and of ESX since 6.5.
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vmdk", 0, b"\xbe\xba\xfe\xca\0\0\0\0"),
    ("vdi", 64, b"\x7f\x10\xda\xbe"),
    ("vhdx", 0, b"vhdxfile"),
    ("vpc", 0, b"conectix"),
    ("parallels", 0, b"WithoutFreeSpace"),
    ("parallels", 0, b"WithouFreSpacExt"),
    ("bochs", 0, b"Bochs Virtual HD Image\0"),
    ("cloop", 0, b"#!/bin/sh\n#V2.0 Format\n"),
)

#: The start of a VMDK descriptor, which is text. VMware writes the comment; QEMU accepts comments before the version.
_VMDK_DESCRIPTOR = rb"\s*(?:#\s*disk\s+descriptorfile\b|(?:#[^\n]*\n\s*)*version\s*=\s*[0-9])"

# The footer of a VHD has 512 bytes, or 511 before 2004. Its checksum distinguishes it from data with the same letters.
_VHD_COOKIE = b"conectix"
_VHD_FOOTERS = (512, 511)
_VHD_CHECKSUM = slice(64, 68)

#: The trailer of an Apple disk image: signature, version 4, size 512.
_DMG_TRAILER = b"koly\0\0\0\x04\0\0\x02\0"


def container_format(read: Read, size: int) -> str | None:
    """Return QEMU's name of the container format of an image of `size` bytes, or None if the image looks raw."""
    start = read(0, _SECTOR)
    for name, offset, signature in _SIGNATURES:
        if start.startswith(signature, offset):
            return name
    if re.match(_VMDK_DESCRIPTOR, start, re.IGNORECASE):
        return "vmdk"
    end = read(max(0, size - _SECTOR), _SECTOR)
    if end.startswith(_DMG_TRAILER):
        return "dmg"
    if any(_is_vhd_footer(end[-length:]) for length in _VHD_FOOTERS):
        return "vpc"
    return None


def _is_vhd_footer(footer: bytes) -> bool:
    if not footer.startswith(_VHD_COOKIE):
        return False
    expected = int.from_bytes(footer[_VHD_CHECKSUM], "big")
    return ~(sum(footer) - sum(footer[_VHD_CHECKSUM])) & 0xFFFF_FFFF == expected

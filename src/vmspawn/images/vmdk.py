# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds the other files that a VMDK image names (VMware's "Virtual Disk Format 5.0").

The descriptor of a VMDK is text that names extents and possibly a parent. A VMDK in a single file embeds its
descriptor, which names one extent: the file itself. QEMU opens only the file that it gets. With `backing` null it
does not open the parent, and returns zeroes in place of the parent's data, without an error.
"""

from __future__ import annotations

import re
import struct

from .detection import Read

_SECTOR = 512

# A sparse extent's header: capacity, grain size, offset and size of the embedded descriptor, in sectors.
_MAGIC = b"KDMV"
_ESX_MAGICS = (b"COWD", b"\xbe\xba\xfe\xca")
_HEADER = struct.Struct("<4sIIQQQQ")

#: QEMU reads the parent's name here, and ignores the descriptor's offset in the header.
_QEMU_OFFSET, _QEMU_SIZE = 512, 20 * _SECTOR
#: VMware's descriptors have up to 20 sectors.
_DESCRIPTOR_MAX = 128 * _SECTOR

_TITLE = re.compile(rb"#\s*disk\s+descriptorfile", re.IGNORECASE)
_PARENT_ID = re.compile(rb"^\s*parentCID\s*=\s*\"?([0-9a-f]*)", re.IGNORECASE | re.MULTILINE)
_NO_PARENT = "ffffffff"
_PARENT_NAME = re.compile(rb"parentFileNameHint(?:\s*=\s*\"([^\"\n]*))?", re.IGNORECASE)
_EXTENT = re.compile(
    rb"^[ \t]*(?:RW|RDONLY|NOACCESS)[ \t]+\d+[ \t]+(\w+)(?:[ \t]+\"([^\"\n]*))?", re.IGNORECASE | re.MULTILINE
)


def parent_and_extents(read: Read) -> tuple[str | None, list[str]]:
    """Return the parent's name, or None without a parent, and the names of the extents that are in other files.

    A name is empty if the image does not give it. Raises ValueError for an extent whose descriptor is in another file.
    """
    header = read(0, _HEADER.size)
    if header.startswith(_ESX_MAGICS):
        raise ValueError("it is a sparse extent of ESX, whose descriptor is in another file")
    if not header.startswith(_MAGIC):
        descriptor = read(0, _DESCRIPTOR_MAX)
        return _parent(descriptor), [_text(name) for _, name in _EXTENT.findall(descriptor)] or [""]
    _, _, _, capacity, _, offset, size = _HEADER.unpack(header.ljust(_HEADER.size, b"\0"))
    if size * _SECTOR > _DESCRIPTOR_MAX:
        raise ValueError("its descriptor is too large")
    descriptor = read(offset * _SECTOR, size * _SECTOR) if offset else b""
    extents = _EXTENT.findall(descriptor)
    if not capacity:
        # An extent without capacity is a descriptor only, and QEMU then opens the extents that it names.
        return _parent(descriptor), [_text(name) for _, name in extents] or [""]
    if not _TITLE.search(descriptor):
        raise ValueError("it is one extent of a disk, whose descriptor is in another file")
    parent = _parent(descriptor)
    if parent is None:
        parent = _parent(read(_QEMU_OFFSET, _QEMU_SIZE).partition(b"\0")[0])
    is_alone = len(extents) <= 1 and all(kind.upper() == b"SPARSE" for kind, _ in extents)
    return parent, [] if is_alone else [_text(name) for _, name in extents]


def _parent(descriptor: bytes) -> str | None:
    if name := _PARENT_NAME.search(descriptor):
        return _text(name[1] or b"")
    identifiers = [found.decode().lower() for found in _PARENT_ID.findall(descriptor)]
    return None if all(each == _NO_PARENT for each in identifiers) else ""


def _text(name: bytes) -> str:
    return name.decode(errors="replace")

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lists the other files that a disk image names: backing files, data files, extents and parents.

Each reader takes a function `read(offset, length)`, which returns fewer bytes at the image's end. A reader reads a
bounded amount of any image. It returns an empty list for an image that is complete by itself, and raises ValueError
with the reason for an image that cannot be checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .detection import Read

# The qcow2 header (QEMU's docs/interop/qcow2.txt): the version, and the offset and length of the backing file's name.
# Version 3 adds the incompatible features and the header's length. Bit 2 of the features marks an image whose data is
# in another file. Extensions follow the header: type, length, and data that is padded to 8 bytes.
_QCOW2_VERSION = slice(4, 8)
_QCOW2_BACKING_OFFSET = slice(8, 16)
_QCOW2_BACKING_LENGTH = slice(16, 20)
_QCOW2_INCOMPATIBLE = slice(72, 80)
_QCOW2_HEADER_LENGTH = slice(100, 104)
_QCOW2_HEADER = 104
_QCOW2_DATA_FILE = 1 << 2
_QCOW2_DATA_FILE_NAME = 0x44415441
_QCOW2_EXTENSIONS_MAX = 64
_NAME_MAX = 1023

# The VDI header (QEMU's block/vdi.c): the version, the image's type, and the UUIDs of the linked image and of the
# parent. An image of type 1 or 2 is a whole disk; types 3 and 4 are changes to another image.
_VDI_VERSION = slice(0x44, 0x48)
_VDI_TYPE = slice(0x4C, 0x50)
_VDI_PARENTS = slice(0x1A8, 0x1C8)
_VDI_HEADER = 512
_VDI_WHOLE = (1, 2)


class OtherFile(NamedTuple):
    """A file that an image names.

    `role` is "backing file", "data file", "extent" or "parent". `name` is the file's name in the image, and empty if
    the image does not give one.
    """

    role: str
    name: str = ""


def other_files(image_format: str, read: Read) -> list[OtherFile]:
    """Return the files that an image of that format names. Raises ValueError if the image cannot be checked."""
    return READERS[image_format](read)


def _of_raw(read: Read) -> list[OtherFile]:
    return []


def _of_qcow2(read: Read) -> list[OtherFile]:
    header = read(0, _QCOW2_HEADER).ljust(_QCOW2_HEADER, b"\0")
    version = _big(header[_QCOW2_VERSION])
    if version > 3:
        raise ValueError(f"it has version {version} of the format")
    found = []
    if offset := _big(header[_QCOW2_BACKING_OFFSET]):
        name = read(offset, min(_big(header[_QCOW2_BACKING_LENGTH]), _NAME_MAX))
        found.append(OtherFile("backing file", _text(name)))
    if version == 3 and _big(header[_QCOW2_INCOMPATIBLE]) & _QCOW2_DATA_FILE:
        found.append(OtherFile("data file", _qcow2_data_file(read, _big(header[_QCOW2_HEADER_LENGTH]))))
    return found


def _qcow2_data_file(read: Read, offset: int) -> str:
    for _ in range(_QCOW2_EXTENSIONS_MAX):
        extension = read(offset, 8)
        kind, length = _big(extension[:4]), _big(extension[4:])
        if kind == _QCOW2_DATA_FILE_NAME:
            return _text(read(offset + 8, min(length, _NAME_MAX)))
        if not kind:
            break
        offset += 8 + -(-length // 8) * 8
    return ""


def _of_vdi(read: Read) -> list[OtherFile]:
    header = read(0, _VDI_HEADER)
    if len(header) < _VDI_HEADER:
        raise ValueError("its header is cut off")
    version, kind = (int.from_bytes(header[field], "little") for field in (_VDI_VERSION, _VDI_TYPE))
    if version != 0x0001_0001:
        raise ValueError(f"it has version {version >> 16}.{version & 0xFFFF} of the format")
    if kind not in _VDI_WHOLE or any(header[_VDI_PARENTS]):
        return [OtherFile("parent")]
    return []


def _of_vmdk(read: Read) -> list[OtherFile]:
    from . import vmdk

    parent, extents = vmdk.parent_and_extents(read)
    return [OtherFile("extent", name) for name in extents] + ([] if parent is None else [OtherFile("parent", parent)])


def _of_vhdx(read: Read) -> list[OtherFile]:
    from . import vhdx

    parent = vhdx.parent(read)
    return [] if parent is None else [OtherFile("parent", parent)]


def _big(data: bytes) -> int:
    return int.from_bytes(data, "big")


def _text(name: bytes) -> str:
    return name.decode(errors="replace")


#: The readers of all formats that a disk can have.
READERS: dict[str, Callable[[Read], list[OtherFile]]] = {
    "raw": _of_raw,
    "qcow2": _of_qcow2,
    "vmdk": _of_vmdk,
    "vdi": _of_vdi,
    "vhdx": _of_vhdx,
}

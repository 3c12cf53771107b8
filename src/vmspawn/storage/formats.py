# SPDX-License-Identifier: LGPL-2.1-or-later
"""Image formats, and what an image's header may say.

A header can name other files: a backing file, a data file, extents. QEMU would open them by their path, a path of the
image's author and not of the user. Images with such names are refused, and nodes are built so that QEMU ignores them.
"""

from __future__ import annotations

import os

from ..errors import BadConfig, ConfigNotSupported
from .backing import Backing

#: Formats that a node can be built for, and those of them that QEMU reads well but should not write to.
FORMATS = ("raw", "qcow2", "vmdk", "vdi", "vhdx")
READ_ONLY_FORMATS = ("vmdk", "vdi", "vhdx")
DEFAULT_FORMAT = "raw"

#: What the formats begin with: where, and which bytes.
_MAGIC = {
    "qcow2": (0, b"QFI\xfb"),
    "vmdk": (0, b"KDMV"),
    "vdi": (64, b"\x7f\x10\xda\xbe"),
    "vhdx": (0, b"vhdxfile"),
}
_HEADER_SIZE = 512

# The qcow2 header (QEMU's docs/interop/qcow2.txt): version, offset of the backing file's name, and from version 3 on
# the incompatible features, of which bit 2 says that the data is in another file.
_QCOW2_VERSION = slice(4, 8)
_QCOW2_BACKING_OFFSET = slice(8, 16)
_QCOW2_INCOMPATIBLE = slice(72, 80)
_QCOW2_DATA_FILE = 1 << 2

# A sparse VMDK extent has its capacity in the header; where that is zero, the extents are named in a description.
_VMDK_CAPACITY = slice(12, 20)


def check_format(image_format: str) -> str:
    """Return `image_format` if it exists, raise BadConfig if not."""
    if image_format not in FORMATS:
        raise BadConfig(f"unknown image format {image_format!r}", hint=f"there are: {', '.join(FORMATS)}")
    return image_format


def choose_format(backing: Backing, image_format: str | None, *, what: str) -> str:
    """The format to use, after a look at the image's first bytes.

    A guest that owns a raw disk can write any header into it, so no format is ever guessed: not saying one means raw,
    and an image that looks like another is refused until the user says which. Raises BadConfig, or ConfigNotSupported
    for a writable image of a format that is only read.
    """
    header = os.pread(backing.fd, _HEADER_SIZE, 0)
    looks_like = next((name for name in _MAGIC if _has_magic(header, name)), None)
    if image_format is None:
        if looks_like:
            raise BadConfig(
                f"{what} looks like {looks_like}, and no format was given", hint=f"say format {looks_like} (or raw)"
            )
        return DEFAULT_FORMAT
    check_format(image_format)
    if image_format in _MAGIC and looks_like != image_format:
        raise BadConfig(f"{what} is not in {image_format} format", hint="say format raw, or convert it with qemu-img")
    if image_format == "qcow2":
        _check_qcow2(header, what)
    elif image_format == "vmdk" and not any(header[_VMDK_CAPACITY]):
        raise BadConfig(f"{what} names other files as its extents", hint=_flatten("vmdk"))
    if image_format in READ_ONLY_FORMATS and backing.writable:
        raise ConfigNotSupported(
            f"images in {image_format} format are only read", hint=f"attach it read-only, or: {_flatten(image_format)}"
        )
    return image_format


def _has_magic(header: bytes, image_format: str) -> bool:
    offset, magic = _MAGIC[image_format]
    return header[offset : offset + len(magic)] == magic


def _flatten(image_format: str) -> str:
    return f"convert it with: qemu-img convert -f {image_format} -O qcow2 IMAGE FLAT"


def _check_qcow2(header: bytes, what: str) -> None:
    version = int.from_bytes(header[_QCOW2_VERSION], "big")
    if any(header[_QCOW2_BACKING_OFFSET]):
        raise BadConfig(
            f"{what} has a backing file, which cannot be opened through a descriptor", hint=_flatten("qcow2")
        )
    if version >= 3 and int.from_bytes(header[_QCOW2_INCOMPATIBLE], "big") & _QCOW2_DATA_FILE:
        raise BadConfig(f"{what} has its data in another file", hint=_flatten("qcow2"))

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Chooses an image's format, and refuses images that name other files.

A header can name other files: a backing file, a data file, extents, a parent. The image's author, not the user, chose
their paths. QEMU would open these files, or ignore them and return zeroes. So these images are refused, and nodes are
built so that QEMU ignores the names in a header.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from ..errors import BadConfig, ConfigNotSupported, SystemFailure
from ..images.detection import Read, container_format
from ..text import printable
from .backing import Backing

#: The formats that disks can have, and the formats among them that are attached read-only.
FORMATS = ("raw", "qcow2", "vmdk", "vdi", "vhdx")
READ_ONLY_FORMATS = ("vmdk", "vdi", "vhdx")
DEFAULT_FORMAT = "raw"

#: Descriptions of an image that names another file, by the file's role.
_ROLES = {
    "backing file": "has a backing file",
    "data file": "has its data in another file",
    "extent": "names other files as its extents",
    "parent": "has a parent, without which it is incomplete",
}

#: The beginning of the hint to specify a format. For the machine's image, boot/disks.py names the option instead.
FORMAT_HINT = "specify format "

#: Hints for formats whose parents QEMU cannot read.
_MERGE_HINTS = {
    "vdi": "merge it with its parent: VBoxManage clonemedium disk IMAGE WHOLE",
    "vhdx": "merge it into its parent first, with Merge-VHD",
}


def check_format(image_format: str) -> str:
    """Return `image_format` if it exists. Raises BadConfig if it does not."""
    if image_format not in FORMATS:
        raise BadConfig(f"unknown image format {image_format!r}", hint=f"choose one of: {', '.join(FORMATS)}")
    return image_format


#: Reads a number of bytes at an offset, as os.pread does.
Pread = Callable[[int, int, int], bytes]


def choose_format(backing: Backing, image_format: str | None, *, what: str, pread: Pread = os.pread) -> str:
    """Return an image's format after an inspection of the image.

    The format is never guessed, because a guest that owns a raw disk can write any header into it. Without a format the
    image is raw, and an image that looks like another format is refused until the user specifies the format. Raises
    BadConfig, SystemFailure if the image cannot be read, or ConfigNotSupported for a writable image of a read-only
    format. BlockingIOError of `pread` is passed on.
    """
    if image_format is not None:
        check_format(image_format)
    if image_format == DEFAULT_FORMAT:
        return image_format
    read = _reader(backing, what, pread)
    looks_like = container_format(read, backing.size)
    if image_format is None:
        if looks_like:
            raise BadConfig(
                f"{what} looks like {looks_like}, but no format was specified", hint=_format_hint(looks_like)
            )
        return DEFAULT_FORMAT
    if looks_like != image_format:
        but = f", but looks like {looks_like}" if looks_like else ""
        raise BadConfig(f"{what} is not in {image_format} format{but}", hint=_format_hint(looks_like))
    _check_stands_alone(read, image_format, what)
    if image_format in READ_ONLY_FORMATS and backing.is_writable:
        raise ConfigNotSupported(
            f"images in {image_format} format are read-only", hint=f"attach it read-only, or {_convert(image_format)}"
        )
    return image_format


def _reader(backing: Backing, what: str, pread: Pread) -> Read:
    def read(offset: int, length: int) -> bytes:
        if offset >= backing.size:
            return b""
        try:
            return pread(backing.fd, length, offset)
        except BlockingIOError:
            raise
        except OSError as error:
            raise SystemFailure(f"cannot read {what}", error.errno or errno.EIO) from None

    return read


def _format_hint(looks_like: str | None) -> str:
    if looks_like is None:
        return f"{FORMAT_HINT}raw, or convert the image with qemu-img"
    if looks_like in FORMATS:
        return f"{FORMAT_HINT}{looks_like}, or raw to give the guest the file as it is"
    return f"{FORMAT_HINT}raw to give the guest the file as it is, or {_convert(looks_like)}"


def _check_stands_alone(read: Read, image_format: str, what: str) -> None:
    from ..images.other_files import other_files

    hint = _MERGE_HINTS.get(image_format) or _convert(image_format)
    try:
        found = other_files(image_format, read)
    except ValueError as error:
        raise BadConfig(f"cannot tell whether {what} needs other files: {error}", hint=hint) from None
    if found:
        name = f" ({printable(found[0].name)})" if found[0].name else ""
        raise BadConfig(f"{what} {_ROLES[found[0].role]}{name}", hint=hint)


def _convert(image_format: str) -> str:
    return f"convert it with: qemu-img convert -f {image_format} -O qcow2 IMAGE FLAT"

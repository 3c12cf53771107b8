# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds out whether a kernel and its initrds can mount a virtiofs root, from the files beside the kernel.

1. The kernel's configuration, or its list of built-in modules, shows whether virtiofs is built in, a module or absent.
2. A module must be in an initrd. An initrd is read if it is uncompressed or compressed by gzip.

An initrd that cannot be read is assumed to have the module. If step 1 shows nothing, the kernel is assumed to support
virtiofs, unless there are initrds and all of them lack the module.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import BinaryIO, Protocol

from . import kernel_image

_OPTION = "CONFIG_VIRTIO_FS"
_MODULE = "virtiofs.ko"

# A cpio archive that the kernel unpacks (its buffer-format.txt): a magic and a header of 8-digit hexadecimal fields,
# the name, and the content, each padded to 4 bytes.
_HEADER_SIZE = 110
_MAGICS = (b"070701", b"070702")
_SIZE_FIELD, _NAME_SIZE_FIELD = slice(54, 62), slice(94, 102)
_TRAILER = b"TRAILER!!!"
_NAME_MAX = 4096

_GZIP = b"\x1f\x8b"


class Stream(Protocol):
    """A file, or the unpacked content of a file."""

    def read(self, size: int) -> bytes:
        """Read up to `size` bytes."""

    def seek(self, offset: int, whence: int) -> int:
        """Move the position."""


class Support(Enum):
    """The form in which a kernel has virtiofs."""

    BUILT_IN = "built in"
    MODULE = "module"
    NONE = "none"
    UNKNOWN = "unknown"


def why_not(root: str, linux: str, initrds: Sequence[str]) -> str:
    """Return the reason why a kernel cannot mount `root` as its root; empty if it can, or if that is not known."""
    if kernel_image.kind_of(linux) == kernel_image.UKI:
        return ""
    support = _of_kernel(root, linux)
    if support is Support.NONE:
        return f"{linux} was built without virtiofs ({_OPTION})"
    if support is Support.MODULE and not initrds:
        return f"{linux} has virtiofs as a module, and there is no initrd to load it"
    if support is Support.MODULE and all(_has_module(each) is False for each in initrds):
        return f"{linux} has virtiofs as a module, which is not in {' or '.join(initrds)}"
    if support is Support.UNKNOWN and initrds and all(_has_module(each) is False for each in initrds):
        return f"{' and '.join(initrds)} lacks the module virtiofs, and {linux} may not have it built in"
    return ""


def _of_kernel(root: str, linux: str) -> Support:
    folder, name = os.path.split(linux)
    version = kernel_image.version_of(linux) or name.partition("-")[2]
    configurations = [os.path.join(folder, f"config-{version}"), os.path.join(folder, "../../../.config")]
    modules = [os.path.join(base, "lib/modules", version) for base in (root, "/")]
    for path in (*configurations, *(os.path.join(each, "config") for each in modules)):
        if lines := _lines(path):
            return _of_configuration(lines)
    for each in modules:
        if built_in := _lines(os.path.join(each, "modules.builtin")):
            return _of_modules(built_in, _lines(os.path.join(each, "modules.dep")))
    return Support.UNKNOWN


def _of_configuration(lines: list[bytes]) -> Support:
    for state, support in ((b"y", Support.BUILT_IN), (b"m", Support.MODULE)):
        if _OPTION.encode() + b"=" + state in lines:
            return support
    return Support.NONE


def _of_modules(built_in: list[bytes], modules: list[bytes]) -> Support:
    name = b"/" + _MODULE.encode()
    if any(each.endswith(name) for each in built_in):
        return Support.BUILT_IN
    if not modules:
        return Support.UNKNOWN
    return Support.MODULE if any(name in each.partition(b":")[0] for each in modules) else Support.NONE


def _lines(path: str) -> list[bytes]:
    try:
        with open(path, "rb") as file:
            return file.read().splitlines()
    except OSError:
        return []


def _has_module(initrd: str) -> bool | None:
    """Return whether an initrd has the module, or None if the initrd cannot be read."""
    try:
        with open(initrd, "rb") as file:
            return any(os.path.basename(name).startswith(_MODULE.encode()) for name in _names(file))
    except (OSError, ValueError, EOFError, zlib.error):
        return None


def _names(file: BinaryIO) -> Iterator[bytes]:
    """Yield the names in an initrd, a sequence of archives, of which the last may be compressed.

    Raises ValueError for an unknown format, and OSError, EOFError or zlib.error for a damaged file.
    """
    while start := file.read(4):
        if not start.strip(b"\0"):
            continue
        file.seek(-len(start), os.SEEK_CUR)
        if start.startswith(_GZIP):
            import gzip

            with gzip.open(file) as unpacked:
                yield from _archive(unpacked)
            return
        yield from _archive(file)


def _archive(file: Stream) -> Iterator[bytes]:
    """Yield the names in one archive, and leave the file at the archive's end."""
    while True:
        header = file.read(_HEADER_SIZE)
        if header[:6] not in _MAGICS or len(header) < _HEADER_SIZE:
            raise ValueError("not a cpio archive")
        size, name_size = int(header[_SIZE_FIELD], 16), int(header[_NAME_SIZE_FIELD], 16)
        if name_size > _NAME_MAX:
            raise ValueError("a name is too long")
        name = file.read(name_size).rstrip(b"\0")
        if name == _TRAILER:
            file.seek(-(_HEADER_SIZE + name_size) % 4, os.SEEK_CUR)
            return
        yield name
        file.seek(-(_HEADER_SIZE + name_size) % 4 + size + -size % 4, os.SEEK_CUR)

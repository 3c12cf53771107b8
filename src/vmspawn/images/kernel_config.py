# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads a kernel's configuration: from a file beside the kernel or in its build tree, or out of the kernel itself.

A kernel with CONFIG_IKCONFIG contains its configuration, compressed by gzip, between two marks. Most kernels are
compressed as a whole, so reading the configuration takes a second or two.
"""

from __future__ import annotations

import bz2
import lzma
import os
import re
import subprocess
import zlib
from collections.abc import Callable, Iterator

from ..search_path import find_program
from . import kernel_image

#: The marks around the configuration (the kernel's kernel/configs.c).
_START, _END = b"IKCFG_ST", b"IKCFG_ED"

#: The maximum size of an unpacked kernel in bytes.
_SIZE_MAX = 256 << 20

#: The maximum size of an unpacked configuration in bytes. Distributions' configurations have 300 KiB.
_CONFIG_SIZE_MAX = 16 << 20

_ZSTD_SECONDS = 30

_SETTING = re.compile(rb"^(CONFIG_\w+)=(.*)$", re.MULTILINE)


def read(linux: str, modules: str | None = None) -> dict[str, str]:
    """Return the values of the options that are set, by name; empty if the configuration is not known.

    `modules` is the directory of the kernel's modules. Raises OSError if the kernel cannot be read.
    """
    for path in _places(linux, modules):
        try:
            with open(path, "rb") as file:
                data = file.read(_CONFIG_SIZE_MAX)
        except OSError:
            continue
        if found := _parse(_unpacked_config(data) if data.startswith(b"\x1f\x8b") else data):
            return found
    with open(linux, "rb") as file:
        return _parse(_embedded(file.read(_SIZE_MAX)))


def _places(linux: str, modules: str | None) -> Iterator[str]:
    folder, name = os.path.split(os.path.realpath(linux))
    version = kernel_image.version_of(linux)
    # The first is for an installed kernel, the next two for arch/x86/boot/bzImage and for vmlinux in a build tree.
    if name.startswith("vmlinuz-") and version:
        yield os.path.join(folder, f"config-{version}")
    if name in ("bzImage", "Image", "Image.gz"):
        yield os.path.normpath(os.path.join(folder, "../../../.config"))
    if name == "vmlinux":
        yield os.path.join(folder, ".config")
    if modules is not None:
        yield os.path.join(modules, "config")
        yield os.path.join(modules, "build/.config")


def _parse(data: bytes) -> dict[str, str]:
    return {name.decode(): value.decode(errors="replace") for name, value in _SETTING.findall(data)}


def _embedded(image: bytes) -> bytes:
    """Return the configuration in a kernel image, or an empty result."""
    for content in _unpacked(image):
        start = content.find(_START)
        end = content.find(_END, start)
        if 0 <= start < end:
            return _unpacked_config(content[start + len(_START) : end])
    return b""


def _unpacked_config(data: bytes) -> bytes:
    """Return the content of a configuration in gzip format, or an empty result if it is damaged or too large."""
    unpacking = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        content = unpacking.decompress(data, _CONFIG_SIZE_MAX)
    except zlib.error:
        return b""
    # A part of the configuration would look like a kernel that lacks options.
    return content if unpacking.eof else b""


def _gzip(data: bytes) -> bytes:
    return zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(data, _SIZE_MAX)


def _xz(data: bytes) -> bytes:
    return lzma.LZMADecompressor().decompress(data, _SIZE_MAX)


def _bzip2(data: bytes) -> bytes:
    return bz2.BZ2Decompressor().decompress(data, _SIZE_MAX)


def _zstd(data: bytes) -> bytes:
    if not find_program("zstd"):
        return b""
    # The bytes after the compressed part make zstd fail at the end.
    done = subprocess.run(["zstd", "-dcq"], input=data, capture_output=True, timeout=_ZSTD_SECONDS, check=False)
    return done.stdout


_FORMATS: tuple[tuple[bytes, Callable[[bytes], bytes]], ...] = (
    (b"\x1f\x8b\x08", _gzip),
    (b"\xfd7zXZ\0", _xz),
    (b"BZh", _bzip2),
    (b"\x28\xb5\x2f\xfd", _zstd),
)


def _unpacked(image: bytes) -> Iterator[bytes]:
    """Yield the image itself, and the content of each compressed part."""
    yield image
    for magic, unpack in _FORMATS:
        at = image.find(magic)
        while at >= 0:
            try:
                content = unpack(image[at:])
            except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, subprocess.SubprocessError):
                content = b""
            if len(content) > len(_START):
                yield content
            # Code may contain the same bytes as the magic number. A small result indicates this case.
            at = image.find(magic, at + 1) if len(content) < 1 << 20 else -1

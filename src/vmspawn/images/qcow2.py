# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads the disk inside a qcow2 image, and writes empty overlays.

The format is QEMU's docs/interop/qcow2.txt. All numbers in it are big-endian.
"""

import os
import struct
from typing import NamedTuple

from ..errors import StartError

# Magic, version, offset and length of the backing file's name, cluster bits, size, encryption, L1 entries, L1 offset,
# offset and clusters of the refcount table, number and offset of the snapshots. Version 3 adds incompatible, compatible
# and autoclear features, refcount order and header length.
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_MAGIC = b"QFI\xfb"

_CLUSTER_BITS = 16
_CLUSTER = 1 << _CLUSTER_BITS
_OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
_SIZE_MAX = (1 << 63) - 1
_COMPRESSED = 1 << 62
_READS_AS_ZERO = 1
#: Incompatible features: the data is in another file; the compression is not deflate; L2 entries have 16 bytes.
_EXTERNAL_DATA, _COMPRESSION_TYPE, _EXTENDED_L2 = 1 << 2, 1 << 3, 1 << 4


class Layout(NamedTuple):
    """Fields of a header: the disk's size in bytes, the bits of a cluster's size, the L1 table's offset and length."""

    size: int
    cluster_bits: int
    l1_offset: int
    l1_entries: int


def layout_of(fd: int, path: str) -> Layout:
    """Read an image's header. Raises StartError if the image has features that this reader does not support."""
    raw = os.pread(fd, _HEADER.size, 0).ljust(_HEADER.size, b"\0")
    magic, version, _, _, bits, size, encryption, entries, l1, _, _, _, _, incompatible, *_ = _HEADER.unpack(raw)
    incompatible = incompatible if version >= 3 else 0
    is_unknown = encryption or incompatible & (_EXTERNAL_DATA | _EXTENDED_L2)
    if magic != _MAGIC or not 9 <= bits <= 21 or is_unknown or l1 > _OFFSET_MASK or size > _SIZE_MAX:
        raise StartError(
            f"cannot read {path}: it is damaged, encrypted, or has qcow2 features that only QEMU supports",
            hint="convert it with qemu-img convert, or pass a kernel argument root=…",
        )
    return Layout(size, bits, l1, entries)


class Reader:
    """Reads the disk inside an image that has no backing file. The caller keeps and closes the descriptor."""

    def __init__(self, fd: int, path: str) -> None:
        self._fd = fd
        self._path = path
        self._layout = layout_of(fd, path)

    def read(self, offset: int, length: int) -> bytes:
        """Read `length` bytes of the disk at `offset`; returns fewer at the disk's end."""
        length = max(0, min(length, self._layout.size - offset))
        cluster = 1 << self._layout.cluster_bits
        parts = []
        while length:
            within = offset % cluster
            count = min(length, cluster - within)
            parts.append(self._cluster(offset // cluster)[within : within + count])
            offset, length = offset + count, length - count
        return b"".join(parts)

    def _cluster(self, number: int) -> bytes:
        size = 1 << self._layout.cluster_bits
        entries = size // 8
        table = self._entry(self._layout.l1_offset, number // entries) & _OFFSET_MASK
        entry = self._entry(table, number % entries) if table else 0
        if entry & _COMPRESSED:
            return self._compressed(entry, size)
        offset = entry & _OFFSET_MASK
        if not offset or entry & _READS_AS_ZERO:
            return bytes(size)
        return os.pread(self._fd, size, offset).ljust(size, b"\0")

    def _entry(self, table: int, index: int) -> int:
        return int.from_bytes(os.pread(self._fd, 8, table + 8 * index), "big")

    def _compressed(self, entry: int, size: int) -> bytes:
        import zlib

        shift = 62 - (self._layout.cluster_bits - 8)
        offset = entry & ((1 << shift) - 1)
        sectors = ((entry & (_COMPRESSED - 1)) >> shift) + 1
        data = os.pread(self._fd, sectors * 512 - offset % 512, offset)
        try:
            return zlib.decompressobj(-12).decompress(data, size)
        except zlib.error:
            raise StartError(
                f"cannot read the partitions of {self._path}: their compression is not supported",
                hint="pass a kernel argument: root=…",
            ) from None


def write_empty(fd: int, size: int) -> None:
    """Write an empty overlay for a disk of `size` bytes to an empty file. All reads go to the backing image.

    The overlay names no backing file: QEMU's command line names the backing node. Cluster 0 is the header, 1 the
    refcount table, 2 its first block; the L1 table follows.
    """
    per_l2 = _CLUSTER // 8
    l1_entries = -(-size // (per_l2 * _CLUSTER))
    l1_clusters = max(1, -(-l1_entries * 8 // _CLUSTER))
    header = (_MAGIC, 3, 0, 0, _CLUSTER_BITS, size, 0, l1_entries, 3 * _CLUSTER, _CLUSTER, 1, 0, 0, 0, 0, 0, 4)
    os.ftruncate(fd, (3 + l1_clusters) * _CLUSTER)
    os.pwrite(fd, _HEADER.pack(*header, _HEADER.size), 0)
    os.pwrite(fd, struct.pack(">Q", 2 * _CLUSTER), _CLUSTER)
    os.pwrite(fd, struct.pack(">H", 1) * (3 + l1_clusters), 2 * _CLUSTER)

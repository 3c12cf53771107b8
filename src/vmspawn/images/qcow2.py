# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads the guest's view of a qcow2 image, and writes empty overlays.

The format is QEMU's docs/interop/qcow2.txt. All numbers in it are big-endian.
"""

import os
import struct
from typing import NamedTuple

from ..errors import StartError

# magic, version, backing file's offset and length, cluster bits, size, encryption, L1 entries, L1 offset,
# refcount table's offset and clusters, snapshots, their offset; version 3: incompatible, compatible and autoclear
# features, refcount order, header length
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_MAGIC = b"QFI\xfb"

_CLUSTER_BITS = 16
_CLUSTER = 1 << _CLUSTER_BITS
_OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
_SIZE_MAX = (1 << 63) - 1
_COMPRESSED = 1 << 62
_READS_AS_ZERO = 1
#: Incompatible features that change where data is or how it is packed.
_EXTERNAL_DATA, _COMPRESSION_TYPE, _EXTENDED_L2 = 1 << 2, 1 << 3, 1 << 4


class Layout(NamedTuple):
    """The fields of a header: the size of the disk in bytes, the bits of a cluster's size, the first-level table."""

    size: int
    cluster_bits: int
    l1_offset: int
    l1_entries: int


def layout_of(fd: int, path: str) -> Layout:
    """Read an image's header. Raises StartError for an image with features that are not supported here."""
    raw = os.pread(fd, _HEADER.size, 0).ljust(_HEADER.size, b"\0")
    magic, version, _, _, bits, size, encryption, entries, l1, _, _, _, _, incompatible, *_ = _HEADER.unpack(raw)
    incompatible = incompatible if version >= 3 else 0
    is_unknown = encryption or incompatible & (_EXTERNAL_DATA | _EXTENDED_L2)
    if magic != _MAGIC or not 9 <= bits <= 21 or is_unknown or l1 > _OFFSET_MASK or size > _SIZE_MAX:
        raise StartError(
            f"cannot look into {path}: it is encrypted or damaged, or has features of qcow2 that only QEMU reads",
            hint="convert it with: qemu-img convert; for its partitions, a kernel argument root=… will do",
        )
    return Layout(size, bits, l1, entries)


class Reader:
    """Reads an image without a backing file as the guest does. The descriptor stays the caller's."""

    def __init__(self, fd: int, path: str) -> None:
        self._fd = fd
        self._path = path
        self._layout = layout_of(fd, path)

    def read(self, offset: int, length: int) -> bytes:
        """Read from the disk; returns fewer bytes beyond its end."""
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
                f"cannot look into {self._path} for its partitions: they are compressed in a way not known here",
                hint="pass a kernel argument: root=…",
            ) from None


def write_empty(fd: int, size: int) -> None:
    """Make an open, empty file an image of `size` bytes without data; reads go to the image below it.

    It names no backing file: QEMU's command line names the node. Cluster 0 is the header, 1 the reference counts'
    table, 2 their first block; the first-level table follows.
    """
    per_l2 = _CLUSTER // 8
    l1_entries = -(-size // (per_l2 * _CLUSTER))
    l1_clusters = max(1, -(-l1_entries * 8 // _CLUSTER))
    header = (_MAGIC, 3, 0, 0, _CLUSTER_BITS, size, 0, l1_entries, 3 * _CLUSTER, _CLUSTER, 1, 0, 0, 0, 0, 0, 4)
    os.ftruncate(fd, (3 + l1_clusters) * _CLUSTER)
    os.pwrite(fd, _HEADER.pack(*header, _HEADER.size), 0)
    os.pwrite(fd, struct.pack(">Q", 2 * _CLUSTER), _CLUSTER)
    os.pwrite(fd, struct.pack(">H", 1) * (3 + l1_clusters), 2 * _CLUSTER)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds the parent of a VHDX image (Microsoft's MS-VHDX).

Two copies of a region table point to the metadata. One item of the metadata has a flag for a parent. Another item, the
parent locator, has pairs of keys and values with the parent's paths.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Iterator
from typing import Any

from .detection import Read

_TABLE_SIZE = 64 << 10
_ENTRIES_MAX = 2047

_REGION_TABLES = (192 << 10, 256 << 10)
_REGION_HEADER = struct.Struct("<4s4xI4x")
_REGION_ENTRY = struct.Struct("<16sQII")
_METADATA = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e").bytes_le

_METADATA_HEADER = struct.Struct("<8s2xH20x")
_METADATA_ENTRY = struct.Struct("<16sIII4x")
_FILE_PARAMETERS = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b").bytes_le
_PARENT_LOCATOR = uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c").bytes_le

_PARAMETERS = struct.Struct("<II")
_HAS_PARENT = 1 << 1

_LOCATOR_HEADER = struct.Struct("<16s2xH")
_LOCATOR_ENTRY = struct.Struct("<IIHH")
_PATHS = ("relative_path", "absolute_win32_path", "volume_path")


def parent(read: Read) -> str | None:
    """Return the parent's path, or None for an image without a parent. The path is empty if the image does not give it.

    Raises ValueError if the image lacks the tables that point to its parent.
    """
    tables = [table for table in (read(offset, _TABLE_SIZE) for offset in _REGION_TABLES) if table[:4] == b"regi"]
    if not tables:
        raise ValueError("it has no region table")
    found = [_parent(read, offset) for table in tables for offset in _metadata_offsets(table)]
    return next((name for name in found if name is not None), None)


def _metadata_offsets(table: bytes) -> list[int]:
    _, count = _REGION_HEADER.unpack(table[: _REGION_HEADER.size].ljust(_REGION_HEADER.size, b"\0"))
    entries = _entries(table, _REGION_HEADER.size, _REGION_ENTRY, count)
    offsets = [offset for kind, offset, _, _ in entries if kind == _METADATA]
    if len(offsets) != 1:
        raise ValueError("its region table does not point to its metadata")
    return offsets


def _parent(read: Read, region: int) -> str | None:
    table = read(region, _TABLE_SIZE)
    if not table.startswith(b"metadata"):
        raise ValueError("it has no metadata")
    _, count = _METADATA_HEADER.unpack(table[: _METADATA_HEADER.size].ljust(_METADATA_HEADER.size, b"\0"))
    items = {
        kind: (region + offset, length)
        for kind, offset, length, _ in _entries(table, _METADATA_HEADER.size, _METADATA_ENTRY, count)
    }
    if _FILE_PARAMETERS not in items:
        raise ValueError("its metadata has no file parameters")
    parameters = read(items[_FILE_PARAMETERS][0], _PARAMETERS.size)
    if len(parameters) < _PARAMETERS.size:
        raise ValueError("its metadata is cut off")
    has_parent = _PARAMETERS.unpack(parameters)[1] & _HAS_PARENT
    if _PARENT_LOCATOR in items:
        offset, length = items[_PARENT_LOCATOR]
        return _path(read(offset, min(length, _TABLE_SIZE)))
    return "" if has_parent else None


def _path(locator: bytes) -> str:
    """Return the first path in a parent locator, or an empty string if the locator has none."""
    if len(locator) < _LOCATOR_HEADER.size:
        return ""
    _, count = _LOCATOR_HEADER.unpack(locator[: _LOCATOR_HEADER.size])
    pairs = {
        _utf16(locator[key : key + key_length]): _utf16(locator[value : value + value_length])
        for key, value, key_length, value_length in _entries(locator, _LOCATOR_HEADER.size, _LOCATOR_ENTRY, count)
    }
    return next((pairs[key] for key in _PATHS if key in pairs), "")


def _utf16(text: bytes) -> str:
    return text.decode("utf-16-le", errors="replace")


def _entries(table: bytes, start: int, entry: struct.Struct, count: int) -> Iterator[tuple[Any, ...]]:
    for number in range(min(count, _ENTRIES_MAX)):
        at = start + number * entry.size
        if len(table) < at + entry.size:
            return
        yield entry.unpack_from(table, at)

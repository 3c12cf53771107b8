# SPDX-License-Identifier: LGPL-2.1-or-later
"""Counts lines and columns in a stream as QEMU's newer parser does, without keeping the stream."""

from __future__ import annotations


class Positions:
    """Counts the lines and columns of a buffer whose beginning is removed from time to time."""

    __slots__ = ("_column", "_line")

    def __init__(self) -> None:
        # The position of the buffer's first byte, counted from 1.
        self._line = self._column = 1

    def drop(self, data: bytes | bytearray, end: int) -> None:
        """Count `data` up to `end`, before it is removed from the buffer."""
        self._line, self._column = self._at(data, end)

    def prefix(self, data: bytearray, offset: int, *, is_late: bool) -> str:
        """Return QEMU's prefix of an error at `offset`. `is_late` is true if QEMU counts that byte twice."""
        line, column = self._at(data, offset)
        return f"{line}:{column + is_late}: "

    def _at(self, data: bytes | bytearray, offset: int) -> tuple[int, int]:
        newline = data.rfind(b"\n", 0, offset)
        if newline < 0:
            return self._line, self._column + offset
        return self._line + data.count(b"\n", 0, offset), offset - newline

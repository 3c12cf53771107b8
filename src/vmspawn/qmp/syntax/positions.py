# SPDX-License-Identifier: LGPL-2.1-or-later
"""Counts lines and columns in a stream as QEMU's newer parser does, without keeping the stream."""

from __future__ import annotations


class Places:
    """Returns the line and column of places in a buffer whose beginning is dropped now and then."""

    __slots__ = ("_column", "_line")

    def __init__(self) -> None:
        # Of the buffer's first byte, both counted from 1.
        self._line = self._column = 1

    def drop(self, data: bytes | bytearray, end: int) -> None:
        """Count `data` up to `end`, which leaves the buffer."""
        self._line, self._column = self._at(data, end)

    def name(self, data: bytearray, offset: int, *, late: bool) -> str:
        """Return QEMU's prefix of an error there. `late` is true if QEMU reads the byte twice and counts it."""
        line, column = self._at(data, offset)
        return f"{line}:{column + late}: "

    def _at(self, data: bytes | bytearray, offset: int) -> tuple[int, int]:
        newline = data.rfind(b"\n", 0, offset)
        if newline < 0:
            return self._line, self._column + offset
        return self._line + data.count(b"\n", 0, offset), offset - newline

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lines and columns in a stream of which only the end is kept, as QEMU's newer parser counts them."""

from __future__ import annotations


class Places:
    """Names places in a buffer whose beginning is dropped now and then."""

    __slots__ = ("_column", "_line")

    def __init__(self) -> None:
        # Of the buffer's first byte, both counted from 1.
        self._line = self._column = 1

    def drop(self, data: bytes | bytearray, end: int) -> None:
        """`data` up to `end` leaves the buffer."""
        self._line, self._column = self._at(data, end)

    def name(self, data: bytearray, offset: int, *, late: bool) -> str:
        """What QEMU writes before an error there. `late` says that it read the byte twice and counts from behind it."""
        line, column = self._at(data, offset)
        return f"{line}:{column + late}: "

    def _at(self, data: bytes | bytearray, offset: int) -> tuple[int, int]:
        newline = data.rfind(b"\n", 0, offset)
        if newline < 0:
            return self._line, self._column + offset
        return self._line + data.count(b"\n", 0, offset), offset - newline

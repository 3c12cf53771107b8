# SPDX-License-Identifier: LGPL-2.1-or-later
"""Counts the commands of a QMP stream that have no reply, to distinguish an interrupted stream from a complete one."""

from __future__ import annotations

import re

#: Bytes that open and close messages and strings; QEMU accepts strings in single quotes as well.
_MARK = re.compile(rb'["\'\\{}\[\]]')

#: The beginnings of lines that are not replies: events and the greeting.
_NO_REPLY = (b'{"timestamp"', b'{"QMP"')
_LINE_BEGINNING = max(map(len, _NO_REPLY))


class Tally:
    """Counts messages and replies. QEMU sends at least one error for each counted message that is not JSON."""

    def __init__(self) -> None:
        self._sent = self._answered = 0
        self._depth = 0
        self._quote = b""
        # True if the next byte is escaped.
        self._is_escaped = False
        self._line = b""

    @property
    def unanswered(self) -> int:
        """The number of complete messages that have no reply."""
        return max(0, self._sent - self._answered)

    def send(self, data: bytes) -> None:
        """Count the messages whose last byte is in this piece of the sent data."""
        escaped = 0 if self._is_escaped else -1
        for mark in _MARK.finditer(data):
            if mark.start() != escaped:
                escaped = self._take(mark, escaped)
        self._is_escaped = bool(data) and escaped == len(data)

    def _take(self, mark: re.Match[bytes], escaped: int) -> int:
        """Process a mark. Returns the offset of the last byte that a backslash escapes."""
        match mark[0]:
            case b"\\" if self._quote:
                return mark.end()
            case quote if quote == self._quote:
                self._quote = b""
            case _ if self._quote:
                pass
            case b'"' | b"'" as quote:
                self._quote = quote
            case b"{" | b"[":
                self._depth += 1
            case b"}" | b"]" if self._depth:
                self._depth -= 1
                self._sent += not self._depth
        return escaped

    def receive(self, data: bytes) -> None:
        """Count the replies whose last byte is in this piece of the received data."""
        *ended, last = data.split(b"\n")
        for rest in ended:
            line = self._line + rest[:_LINE_BEGINNING]
            self._answered += not line.startswith(_NO_REPLY)
            self._line = b""
        self._line = (self._line + last)[:_LINE_BEGINNING]

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads a complete message: its JSON with msgspec, or its first error as QEMU reports it.

msgspec reads nearly all messages. Strings in a form that only QEMU accepts are rewritten for msgspec. The tokens are
examined one by one only if msgspec refuses a message, or cannot tell whether QEMU would.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import msgspec

from .dialect import Dialect
from .grammar import Grammar, SyntaxProblem, tokens
from .message import SEARCHED, Doubt, Message, parse
from .positions import Positions
from .strings import lenient, requote

#: The maximum number of bytes that are examined token by token, at 3 µs each, in an incomplete or invalid message.
_EXAMINED = SEARCHED

#: The same in a message that may have duplicate members, which msgspec does not report. A larger message of this kind
#: is refused.
_EXAMINED_MEMBERS = 64 << 10

#: NUL in modified UTF-8, which only QEMU accepts. It is rewritten to the escape for msgspec.
_NUL = re.compile(rb"(?<!\\)\xc0\x80")


@dataclass(frozen=True, slots=True)
class Malformed:
    """Bytes that are not a message. QEMU replies with a GenericError of this description, without an id."""

    description: str


class Reader:
    """Reads messages in the buffer of a scanner, which reports their bounds and unusual tokens.

    All positions are offsets in that buffer.
    """

    __slots__ = ("_buffer", "_dialect", "_edits", "_examined", "_grammar", "_is_split", "_positions", "_resumed")

    def __init__(self, dialect: Dialect, buffer: bytearray) -> None:
        self._dialect = dialect
        self._buffer = buffer
        self._positions = Positions()
        # The start of the token at which QEMU's lexer resumed, and which it read twice, or -1.
        self._resumed = -1
        # True if the message has a number that is several tokens for QEMU and one for msgspec.
        self._is_split = False
        # Strings to rewrite for msgspec: start, end and replacement.
        self._edits: list[tuple[int, int, bytes]] = []
        # The grammar, and the end of the tokens that it has checked. In the eager dialect, it checks incomplete
        # messages.
        self._grammar: Grammar | None = None
        self._examined = 0

    # Reports of the scanner.

    def begin(self) -> None:
        """Begin a message."""
        self._is_split = False
        self._grammar = None
        if self._edits:
            self._edits = []

    def requoted(self, start: int, end: int) -> None:
        """Note a string in a form that only QEMU accepts."""
        self._edits.append((start, end, requote(bytes(self._buffer[start:end]))))

    def splits(self) -> None:
        """Note a number that is several tokens for QEMU."""
        self._is_split = True

    def resumed(self, at: int) -> None:
        """Note a byte that QEMU's lexer reads twice."""
        self._resumed = at

    def mute(self) -> None:
        """Note that the rest of the message is skipped."""
        self._edits.clear()

    def passed(self, chunk: bytes) -> None:
        """Note a message that was read without the buffer, which is empty."""
        self._resumed = -1
        if self._dialect.is_eager:
            self._positions.drop(chunk, len(chunk))

    def drop(self, size: int) -> None:
        """Note that `size` bytes are about to be removed from the buffer."""
        if self._dialect.is_eager:
            self._positions.drop(self._buffer, size)
        self._resumed = max(self._resumed - size, -1)
        self._examined -= size
        self._edits = [(start - size, end - size, text) for start, end, text in self._edits]

    # Messages and errors.

    def message(self, start: int, end: int) -> Message | Malformed:
        """Return the complete message, or its error."""
        message = self._parsed(start, end)
        if message is not None and (
            message.doubt is Doubt.NONE or (message.doubt is Doubt.CONTENT and end - start > _EXAMINED)
        ):
            return message
        problem = self._problem(start, end, _EXAMINED if message is None else _EXAMINED_MEMBERS)
        if problem is not None:
            return Malformed(problem)
        if message is None or end - start > _EXAMINED_MEMBERS:
            return Malformed(f"{self._prefix(start)}JSON parse error, expecting value")
        return Message(message.text, message.members, Doubt.NONE)

    def error_so_far(self, start: int, end: int) -> str | None:
        """Return the error of an incomplete message if QEMU reports it already, else None."""
        return self._problem(start, end, _EXAMINED) if self._dialect.is_eager else None

    def stray(self, start: int, end: int) -> str:
        """Return the error of bytes that are not a token."""
        return f"{self._prefix(start)}JSON parse error, stray '{lenient(bytes(self._buffer[start:end]))}'"

    def _parsed(self, start: int, end: int) -> Message | None:
        """Read the message with msgspec; returns None if msgspec or QEMU refuses it."""
        if self._is_split:
            return None
        text = self._edited(start, end)
        try:
            return parse(text if text.isascii() else _NUL.sub(rb"\\u0000", text))
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None

    def _edited(self, position: int, end: int) -> bytes:
        """Return the message with strings rewritten for msgspec."""
        if not self._edits:
            return bytes(self._buffer[position:end])
        pieces: list[bytes | bytearray] = []
        for first, after, replacement in self._edits:
            pieces += (self._buffer[position:first], replacement)
            position = after
        return b"".join((*pieces, self._buffer[position:end]))

    def _problem(self, start: int, end: int, limit: int) -> str | None:
        """Return the first error of the message before `end`, if it is in the first `limit` bytes."""
        if self._grammar is None:
            self._grammar, self._examined = Grammar(self._dialect), start
        for token in tokens(self._buffer, self._examined, end):
            if token.start() - start > limit:
                break
            try:
                self._grammar.feed(token[0])
            except SyntaxProblem as problem:
                return f"{self._prefix(token.start())}JSON parse error, {problem}"
        self._examined = end
        return None

    def _prefix(self, offset: int) -> str:
        if not self._dialect.is_eager:
            return ""
        # The lexer reads the byte after a number or keyword, and the byte at which it resumes, twice.
        is_late = offset == self._resumed or self._buffer[max(0, offset - 1) : offset].isalnum()
        return self._positions.prefix(self._buffer, offset, is_late=is_late)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads a message that was cut out of the stream: its JSON with msgspec, or its first error as QEMU reports it.

msgspec reads nearly all. What only QEMU reads is rewritten for it, or noted as what it must not see; and only where it
does not take a message, or cannot tell, the tokens are looked at one by one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import msgspec

from .dialect import Dialect
from .grammar import Grammar, SyntaxProblem, tokens
from .message import SEARCHED, Doubt, Message, parse
from .positions import Places
from .strings import lenient, requote

#: Bytes of a message that are examined token by token, at some 3 us each, before it has ended or to name its error.
_EXAMINED = SEARCHED

#: The same where nobody else could find the error: a member twice, of which msgspec shows us the last. Larger messages
#: that raise this doubt are refused.
_EXAMINED_MEMBERS = 64 << 10

#: A character that QEMU alone allows to be spelt like this; msgspec knows it by its escape.
_NUL = re.compile(rb"(?<!\\)\xc0\x80")


@dataclass(frozen=True, slots=True)
class Malformed:
    """Bytes that are not a message. QEMU answers with a GenericError of this description, without an id."""

    description: str


class Reader:
    """Reads messages in the buffer of a scanner, which says where they begin and end, and what it met in them.

    All places are offsets in that buffer.
    """

    __slots__ = ("_buffer", "_dialect", "_edits", "_examined", "_grammar", "_places", "_resumed", "_split")

    def __init__(self, dialect: Dialect, buffer: bytearray) -> None:
        self._dialect = dialect
        self._buffer = buffer
        self._places = Places()
        # Where a token began that QEMU's lexer looked at before, or -1.
        self._resumed = -1
        # Whether the message holds a number that QEMU takes for two tokens and msgspec for one.
        self._split = False
        # Strings to be rewritten for msgspec: from where to where, and as what.
        self._edits: list[tuple[int, int, bytes]] = []
        # The grammar's look at the message, which stops before its end only in the eager dialect, and how far it went.
        self._grammar: Grammar | None = None
        self._examined = 0

    # What the scanner meets.

    def begin(self) -> None:
        """Begin a message."""
        self._split = False
        self._grammar = None
        if self._edits:
            self._edits = []

    def requoted(self, start: int, end: int) -> None:
        """Note a string in a form that only QEMU accepts."""
        self._edits.append((start, end, requote(bytes(self._buffer[start:end]))))

    def splits(self) -> None:
        """Note a number that is two tokens to QEMU."""
        self._split = True

    def resumed(self, at: int) -> None:
        """Note a byte that QEMU's lexer reads again."""
        self._resumed = at

    def mute(self) -> None:
        """Skip the rest of the message."""
        self._edits.clear()

    def passed(self, chunk: bytes) -> None:
        """Note a message that was never in the buffer, which is empty."""
        self._resumed = -1
        if self._dialect.eager:
            self._places.drop(chunk, len(chunk))

    def drop(self, size: int) -> None:
        """Note that so many bytes are about to leave the buffer."""
        if self._dialect.eager:
            self._places.drop(self._buffer, size)
        self._resumed = max(self._resumed - size, -1)
        self._examined -= size
        self._edits = [(start - size, end - size, text) for start, end, text in self._edits]

    # What it says, or what is wrong with it.

    def message(self, start: int, end: int) -> Message | Malformed:
        """Read the complete message."""
        message = self._parsed(start, end)
        if message is not None and (
            message.doubt is Doubt.NONE or (message.doubt is Doubt.CONTENT and end - start > _EXAMINED)
        ):
            return message
        problem = self._problem(start, end, _EXAMINED if message is None else _EXAMINED_MEMBERS)
        if problem is not None:
            return Malformed(problem)
        if message is None or end - start > _EXAMINED_MEMBERS:
            return Malformed(f"{self._place(start)}JSON parse error, expecting value")
        return Message(message.text, message.members, Doubt.NONE)

    def error_so_far(self, start: int, end: int) -> str | None:
        """Return the error of a message that has not ended, if QEMU reports it already."""
        return self._problem(start, end, _EXAMINED) if self._dialect.eager else None

    def stray(self, start: int, end: int) -> str:
        """Return the error of bytes that are not a token."""
        return f"{self._place(start)}JSON parse error, stray '{lenient(bytes(self._buffer[start:end]))}'"

    def _parsed(self, start: int, end: int) -> Message | None:
        """Read the message with msgspec; returns None if it is not JSON to msgspec or to QEMU."""
        if self._split:
            return None
        text = self._edited(start, end)
        try:
            return parse(text if text.isascii() else _NUL.sub(rb"\\u0000", text))
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None

    def _edited(self, position: int, end: int) -> bytes:
        """Rewrite the strings of the message for msgspec."""
        if not self._edits:
            return bytes(self._buffer[position:end])
        pieces: list[bytes | bytearray] = []
        for first, behind, replacement in self._edits:
            pieces += (self._buffer[position:first], replacement)
            position = behind
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
                return f"{self._place(token.start())}JSON parse error, {problem}"
        self._examined = end
        return None

    def _place(self, offset: int) -> str:
        if not self._dialect.eager:
            return ""
        # The lexer looks at the byte behind a number or keyword, and where it resumes, before it takes it.
        late = offset == self._resumed or self._buffer[max(0, offset - 1) : offset].isalnum()
        return self._places.name(self._buffer, offset, late=late)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds the start and the end of messages in a stream of QEMU's JSON dialect.

QMP has no line framing: a message ends where its brackets balance. The scanner follows QEMU's lexer and streamer byte
for byte (qobject/json-lexer.c, json-streamer.c) in three points: the bytes of a message, the end of an invalid message,
and the byte at which reading resumes after it. Strings may have single quotes. A lexical error ends a message at once;
reading resumes at the next bracket, comma or colon, or at a byte that QEMU's lexer treats as a control character.

There are four ways to read a message, the fastest first:

1. The caller's pattern matches a whole message (`take_whole`, `take`).
2. msgspec recognises a chunk that is exactly one message of plain JSON, as nearly every client sends it, in 0.5 µs.
3. One regular expression matches other input from bracket to bracket.
4. Where that expression stops, at a single quote, an error or the end of the data, the scanner inspects one token.
"""

from __future__ import annotations

import re
from enum import Enum, auto

import msgspec

from .. import limits
from .dialect import Dialect
from .lexemes import ATOM, ATOM_STARTS, INSIDE, RUN, SKIPPED, WHITESPACE
from .message import Doubt, Message, parse
from .reader import Malformed, Reader

_DIGITS = b"0123456789"
_APOSTROPHE = ord("'")

_TOO_LARGE = "JSON token size limit exceeded"
_TOO_DEEP = "JSON nesting depth limit exceeded"


class _Mode(Enum):
    """The part of a message that comes next in the buffer."""

    TOKEN = auto()
    STRING = auto()  # the rest of a string
    SKIPPING = auto()  # the bytes after a lexical error


class Scanner:
    """Cuts the bytes that one client sends into messages."""

    __slots__ = (
        "_braces", "_brackets", "_buffer", "_chunk", "_dialect", "_found", "_is_muted", "_mode", "_origin",
        "_position", "_quote", "_reader", "_start", "_token", "is_busy",
    )  # fmt: skip

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        # A chunk that was not inspected yet; the buffer is empty then.
        self._chunk = b""
        self._buffer = bytearray()
        self._reader = Reader(dialect, self._buffer)
        # The number of bytes that were removed from the buffer.
        self._origin = 0
        # Offsets in the buffer: the message's start, and the first byte that was not scanned.
        self._start = self._position = 0
        self._mode = _Mode.TOKEN
        # The offset of the open string, and its quote.
        self._token = self._quote = 0
        # QEMU counts braces and brackets separately, and ignores their nesting: a message ends when both counts are
        # zero or one is negative.
        self._braces = self._brackets = 0
        # True if the rest of the message is skipped, because its error was reported.
        self._is_muted = False
        self._found: Message | Malformed | None = None
        #: True if `next` stopped to give others a turn, and must be called again without more data.
        self.is_busy = False

    @property
    def pending(self) -> int:
        """The number of bytes that were fed and are not part of a returned message."""
        return len(self._chunk) or len(self._buffer) - self._start

    @property
    def offset(self) -> int:
        """The offset in the stream of the end of the last message."""
        return self._origin + self._start

    def feed(self, data: bytes) -> None:
        """Append bytes of the stream."""
        if not self._buffer and not self._chunk:
            self._chunk = data
            return
        self._buffer += self._chunk
        self._chunk = b""
        self._buffer += data

    def take_whole(self, pattern: re.Pattern[bytes], data: bytes) -> tuple[bytes | None, ...] | None:
        """Return the groups of the pattern if `data` is exactly one message, and matches; else None.

        The caller feeds `data` only if the result is None.
        """
        if self._buffer or self._chunk or self._mode is not _Mode.TOKEN or self._braces or self._brackets:
            return None
        match = pattern.fullmatch(data)
        if match is None:
            return None
        self._pass(data)
        return match.groups()

    def take(self, pattern: re.Pattern[bytes]) -> tuple[bytes | None, ...] | None:
        """Return the groups of the pattern if the next message matches; else None, and `next` reads the message."""
        if self._mode is not _Mode.TOKEN or self._braces or self._brackets:
            return None
        if self._chunk:
            if pattern.match(self._chunk) is None:
                return None
            self._buffer += self._chunk
            self._chunk = b""
        match = pattern.match(self._buffer, self._start)
        if match is None:
            return None
        # The match refers to the buffer, which changes below.
        captured = match.groups()
        self._start = self._position = match.end()
        if self._start > limits.RECEIVE_SIZE or self._start == len(self._buffer):
            self._forget()
        return captured

    def next(self) -> Message | Malformed | None:
        """Return the next message, or its error; None if `is_busy`, or if more bytes are needed."""
        if self._chunk:
            chunk, self._chunk = self._chunk, b""
            message = self._at_once(chunk)
            if message is not None:
                return message
            self._buffer += chunk
        self._found = None
        self.is_busy = all(self._step() for _ in range(limits.STEPS_PER_TURN))
        return None if self.is_busy else self._outcome()

    def _at_once(self, chunk: bytes) -> Message | None:
        """Return the chunk's message if it is exactly one that QEMU and msgspec read alike, else None."""
        if self._buffer or self._mode is not _Mode.TOKEN or self._braces or self._brackets:
            return None
        # Only QEMU refuses 0e5 and the bytes FE and FF.
        if not chunk.isascii() or b"0e" in chunk or b"0E" in chunk:
            return None
        try:
            message = parse(chunk)
        except msgspec.DecodeError:
            return None
        # The scanner reads messages that are not objects: a number or a keyword ends only at a further byte.
        if message.members is None or message.doubt is not Doubt.NONE:
            return None
        self._pass(chunk)
        return message

    def _pass(self, chunk: bytes) -> None:
        """Count a message that was read without the buffer."""
        self._origin += len(chunk)
        self._reader.passed(chunk)

    def _outcome(self) -> Message | Malformed | None:
        if self._found is None:
            self._check_incomplete()
        if self._found is None or self._start > limits.RECEIVE_SIZE:
            self._forget()
        return self._found

    def _step(self) -> bool:
        """Scan one part; returns False when a message or an error was found, or when the data has ended."""
        if self._mode is _Mode.TOKEN:
            return self._run() if self._braces or self._brackets else self._first()
        return self._string() if self._mode is _Mode.STRING else self._skip()

    # From bracket to bracket.

    def _first(self) -> bool:
        """Scan the first token of a message. If it is not a bracket, it is the whole message."""
        buffer = self._buffer
        self._position = self._start = _end(WHITESPACE, buffer, self._position)
        if self._start == len(buffer):
            return False
        if buffer[self._start] in b"{[":
            return self._run()
        if buffer[self._start] in b"]}:,":
            self._position += 1
            return self._complete()
        return self._special()

    def _run(self) -> bool:
        """Scan from bracket to bracket, until a message ends or a token must be inspected."""
        buffer, position = self._buffer, self._position
        braces, brackets = self._braces, self._brackets
        while True:
            match = RUN.match(buffer, position)
            assert match is not None
            position = match.end()
            if match.lastindex is None:
                break
            bracket = buffer[position - 1]
            if bracket == 0x7B:
                braces += 1
            elif bracket == 0x7D:
                braces -= 1
            elif bracket == 0x5B:
                brackets += 1
            else:
                brackets -= 1
            if braces <= 0 >= brackets or braces < 0 or brackets < 0 or braces + brackets > limits.NESTING:
                break
        self._position, self._braces, self._brackets = position, braces, brackets
        if match.lastindex is None:
            return position < len(buffer) and self._special()
        return self._too_deep() if braces + brackets > limits.NESTING else self._complete()

    # Token by token, where the run stopped.

    def _special(self) -> bool:
        """Scan the token that stopped the run: in single quotes, invalid, or cut off by the end of the data."""
        first = self._buffer[self._position]
        if first in ATOM_STARTS:
            return self._atom()
        if first not in INSIDE:
            return self._error(self._position, self._position + 1)
        self._token, self._quote = self._position, first
        self._position += 1
        self._mode = _Mode.STRING
        return True

    def _string(self) -> bool:
        buffer = self._buffer
        self._position = end = _end(INSIDE[self._quote], buffer, self._position)
        after = end + 1 if buffer[end : end + 1] == b"\\" else end
        if after >= len(buffer):
            return False
        if buffer[end] != self._quote:
            return self._error(self._token, after + 1)
        self._mode = _Mode.TOKEN
        if not self._is_muted and (self._quote == _APOSTROPHE or b"\\'" in buffer[self._token : end]):
            self._reader.requoted(self._token, end + 1)
        return self._token_ended(end + 1)

    def _atom(self) -> bool:
        """Scan a number or keyword, or bytes that begin like a number or keyword."""
        buffer, start = self._buffer, self._position
        end = _end(ATOM, buffer, start)
        if end - start > limits.ATOM_SIZE:
            return self._error(start, end, _TOO_LARGE)
        if end == len(buffer):
            return False
        text = bytes(buffer[start:end])
        zero = text in (b"0", b"-0")
        if not (text.isalpha() or text[-1] in _DIGITS) or (zero and buffer[end] in _DIGITS):
            return self._error(start, end + 1)
        if zero and buffer[end] in b"eE" and (self._braces or self._brackets):
            self._reader.splits()
        more = self._token_ended(end)
        self._reader.resumed(end)
        return more

    def _token_ended(self, end: int) -> bool:
        self._position = end
        return True if self._braces or self._brackets else self._complete()

    def _skip(self) -> bool:
        """Skip the bytes that QEMU's lexer ignores after an error."""
        self._position = self._start = _end(SKIPPED, self._buffer, self._position)
        if self._start == len(self._buffer):
            return False
        self._mode = _Mode.TOKEN
        self._reader.resumed(self._start)
        return True

    # The ends of a message.

    def _complete(self) -> bool:
        """End a message that is complete."""
        if not self._is_muted:
            self._found = self._reader.message(self._start, self._position)
        self._reset(self._position)
        return self._found is None

    def _error(self, start: int, end: int, description: str = "") -> bool:
        """End a message at a lexical error, whatever brackets are open."""
        if not self._is_muted:
            problem = self._reader.error_so_far(self._start, start)
            self._found = Malformed(problem or description or self._reader.stray(start, end))
        self._reset(end)
        self._mode = _Mode.SKIPPING
        return self._found is None

    def _too_deep(self) -> bool:
        if self._is_muted:
            return True
        problem = self._reader.error_so_far(self._start, self._position - 1)
        self._found = Malformed(problem or _TOO_DEEP)
        if self._dialect.is_eager:
            self._mute()
        else:
            self._reset(self._position)
        return False

    def _check_incomplete(self) -> None:
        """Look for an error in an incomplete message."""
        if self._is_muted:
            self._mute()
        elif len(self._buffer) - self._start > limits.COMMAND_SIZE:
            self._found = Malformed(_TOO_LARGE)
            self._mute()
        elif self._braces or self._brackets:
            end = self._token if self._mode is _Mode.STRING else self._position
            problem = self._reader.error_so_far(self._start, end)
            if problem is not None:
                self._found = Malformed(problem)
                self._mute()

    def _mute(self) -> None:
        """Skip the rest of the message."""
        self._is_muted = True
        self._start = self._position
        self._reader.mute()

    def _reset(self, position: int) -> None:
        """Begin a message at `position`."""
        self._start = self._position = position
        self._braces = self._brackets = 0
        self._is_muted = False
        self._reader.begin()

    def _forget(self) -> None:
        """Remove the bytes that are not needed any more."""
        start = self._start
        if not start:
            return
        self._reader.drop(start)
        del self._buffer[:start]
        self._origin += start
        self._position -= start
        self._token -= start
        self._start = 0


def _end(pattern: re.Pattern[bytes], buffer: bytearray, position: int) -> int:
    """Return the end of a match. The patterns match everywhere."""
    match = pattern.match(buffer, position)
    assert match is not None
    return match.end()

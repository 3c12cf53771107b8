# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds where messages begin and end in a stream of QEMU's JSON dialect.

QMP has no line framing: a message ends where its brackets balance. What follows QEMU's lexer and streamer byte for byte
(qobject/json-lexer.c, json-streamer.c) is the cutting: which bytes make up a message, where one that is wrong ends, and
where reading resumes after it. Strings may have single quotes; a lexical error ends a message at once; reading resumes
at the next bracket, comma, colon or control character.

Three speeds. A chunk that is exactly one message of plain JSON, as nearly every client sends it, is recognised by
msgspec in half a microsecond. Everything else runs from bracket to bracket with one regular expression. Only where that
stops, at a single quote, an error or the end of the data, is a token looked at on its own.
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
    STRING = auto()  # the rest of one
    SKIPPING = auto()  # what follows a lexical error


class Scanner:
    """Cuts the bytes that one client sends into messages."""

    __slots__ = (
        "_braces", "_brackets", "_buffer", "_chunk", "_dialect", "_found", "_mode", "_muted", "_origin", "_position",
        "_quote", "_reader", "_start", "_token", "is_busy",
    )  # fmt: skip

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        # A chunk that was not looked at yet; the buffer is empty then.
        self._chunk = b""
        self._buffer = bytearray()
        self._reader = Reader(dialect, self._buffer)
        # How many bytes of the stream have left the buffer.
        self._origin = 0
        # Where in the buffer the message starts, and what is not scanned yet.
        self._start = self._position = 0
        self._mode = _Mode.TOKEN
        # Where the string that is open starts, and with which quote.
        self._token = self._quote = 0
        # QEMU counts them apart and does not care how they nest: a message ends when both are zero or one is negative.
        self._braces = self._brackets = 0
        # Whether the rest of the message is skipped, because its error is reported already.
        self._muted = False
        self._found: Message | Malformed | None = None
        #: Whether `next` stopped to give others a turn, and should be called again without more data.
        self.is_busy = False

    @property
    def pending(self) -> int:
        """The number of bytes that were fed and do not belong to a message that was returned."""
        return len(self._chunk) or len(self._buffer) - self._start

    @property
    def offset(self) -> int:
        """The number of bytes of the stream up to the end of the last message."""
        return self._origin + self._start

    def feed(self, data: bytes) -> None:
        """Add bytes in the order of the stream."""
        if not self._buffer and not self._chunk:
            self._chunk = data
            return
        self._buffer += self._chunk
        self._chunk = b""
        self._buffer += data

    def take_whole(self, pattern: re.Pattern[bytes], data: bytes) -> tuple[bytes | None, ...] | None:
        """What the pattern, which describes whole messages, captures if `data` is one; it was not fed before.

        Otherwise feed it.
        """
        if self._buffer or self._chunk or self._mode is not _Mode.TOKEN or self._braces or self._brackets:
            return None
        match = pattern.fullmatch(data)
        if match is None:
            return None
        self._pass(data)
        return match.groups()

    def take(self, pattern: re.Pattern[bytes]) -> tuple[bytes | None, ...] | None:
        """Return what the pattern captures of the next message, or None if it does not match: `next` reads it then."""
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
        # Before the buffer changes, into which the match looks.
        captured = match.groups()
        self._start = self._position = match.end()
        if self._start > limits.RECEIVE_SIZE or self._start == len(self._buffer):
            self._forget()
        return captured

    def next(self) -> Message | Malformed | None:
        """Return the next message, or its error; None if more bytes must come first, or if `is_busy`."""
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
        """Return the chunk if it is one whole message that QEMU and msgspec read alike."""
        if self._buffer or self._mode is not _Mode.TOKEN or self._braces or self._brackets:
            return None
        # QEMU alone stumbles over 0e5, and over the two bytes that UTF-8 never has.
        if not chunk.isascii() or b"0e" in chunk or b"0E" in chunk:
            return None
        try:
            message = parse(chunk)
        except msgspec.DecodeError:
            return None
        # Only brackets end by themselves.
        if message.members is None or message.doubt is not Doubt.NONE:
            return None
        self._pass(chunk)
        return message

    def _pass(self, chunk: bytes) -> None:
        """Count a message that was never in the buffer."""
        self._origin += len(chunk)
        self._reader.passed(chunk)

    def _outcome(self) -> Message | Malformed | None:
        if self._found is None:
            self._wait()
        if self._found is None or self._start > limits.RECEIVE_SIZE:
            self._forget()
        return self._found

    def _step(self) -> bool:
        """Scan on; returns False when something was found, or when the data has ended."""
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
        """Scan brackets and everything between them, until a message ends or a token needs a closer look."""
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

    # Token by token, where that stopped.

    def _special(self) -> bool:
        """Scan a token that stopped the run: in single quotes, wrong, or cut off by the end of the data."""
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
        if not self._muted and (self._quote == _APOSTROPHE or b"\\'" in buffer[self._token : end]):
            self._reader.requoted(self._token, end + 1)
        return self._token_ended(end + 1)

    def _atom(self) -> bool:
        """Scan a number or keyword, or bytes that begin like one."""
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

    # The ends that a message can have.

    def _complete(self) -> bool:
        """End a message that is complete."""
        if not self._muted:
            self._found = self._reader.message(self._start, self._position)
        self._reset(self._position)
        return self._found is None

    def _error(self, start: int, end: int, description: str = "") -> bool:
        """End a message at a lexical error, however many brackets are open."""
        if not self._muted:
            problem = self._reader.error_so_far(self._start, start)
            self._found = Malformed(problem or description or self._reader.stray(start, end))
        self._reset(end)
        self._mode = _Mode.SKIPPING
        return self._found is None

    def _too_deep(self) -> bool:
        if self._muted:
            return True
        problem = self._reader.error_so_far(self._start, self._position - 1)
        self._found = Malformed(problem or _TOO_DEEP)
        if self._dialect.eager:
            self._mute()
        else:
            self._reset(self._position)
        return False

    def _wait(self) -> None:
        """Look for an error in a message that has not ended yet."""
        if self._muted:
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
        self._muted = True
        self._start = self._position
        self._reader.mute()

    def _reset(self, position: int) -> None:
        """Begin a message here."""
        self._start = self._position = position
        self._braces = self._brackets = 0
        self._muted = False
        self._reader.begin()

    def _forget(self) -> None:
        """Drop the bytes that are not needed any more."""
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
    """Return the end of a match; the patterns match everywhere."""
    match = pattern.match(buffer, position)
    assert match is not None
    return match.end()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where messages begin and end in a stream of QEMU's JSON dialect.

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
from dataclasses import dataclass
from enum import Enum, auto

import msgspec

from . import limits
from .dialect import Dialect
from .grammar import Grammar, SyntaxProblem, tokens
from .lexemes import ATOM, ATOM_STARTS, INSIDE, RUN, SKIPPED, WHITESPACE
from .message import SEARCHED, Doubt, Message, parse
from .places import Places
from .strings import lenient, requote

_DIGITS = b"0123456789"
_APOSTROPHE = ord("'")

_TOO_LARGE = "JSON token size limit exceeded"
_TOO_DEEP = "JSON nesting depth limit exceeded"

#: Bytes of a message that are examined token by token, at some 3 us each, before it has ended or to name its error.
_EXAMINED = SEARCHED

#: The same where nobody else could find the error: a member twice, of which msgspec shows us the last. Larger messages
#: that raise this doubt are refused.
_EXAMINED_MEMBERS = 64 << 10

#: A character that QEMU alone allows to be spelt like this; msgspec knows it by its escape.
_NUL = re.compile(rb"(?<!\\)\xc0\x80")


@dataclass(frozen=True, slots=True)
class Malformed:
    """Bytes that are no message. QEMU answers them with a GenericError of this description, and without an id."""

    description: str


class _Mode(Enum):
    """What comes next in the buffer."""

    TOKEN = auto()
    STRING = auto()  # the rest of one
    SKIPPING = auto()  # what follows a lexical error


class Scanner:
    """Cuts the bytes that one client sends into messages."""

    __slots__ = (
        "_braces", "_brackets", "_buffer", "_chunk", "_dialect", "_edits", "_examined", "_found", "_grammar", "_mode",
        "_muted", "_origin", "_places", "_position", "_quote", "_resumed", "_split", "_start", "_token", "busy",
    )  # fmt: skip

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._places = Places()
        # A chunk that was not looked at yet; the buffer is empty then.
        self._chunk = b""
        self._buffer = bytearray()
        # How many bytes of the stream have left the buffer, and after how many a token began that was looked at before.
        self._origin = 0
        self._resumed = -1
        # Where in the buffer the message starts, and what is not scanned yet.
        self._start = self._position = 0
        self._mode = _Mode.TOKEN
        # Where the string that is open starts, and with which quote.
        self._token = self._quote = 0
        # QEMU counts them apart and does not care how they nest: a message ends when both are zero or one is negative.
        self._braces = self._brackets = 0
        # Whether the message holds a number that QEMU takes for two tokens and msgspec for one.
        self._split = False
        # Whether the rest of the message is skipped, because its error is reported already.
        self._muted = False
        # Strings to be rewritten for msgspec: from where to where, and as what.
        self._edits: list[tuple[int, int, bytes]] = []
        # The grammar's look at the message, which stops before its end only in the eager dialect, and how far it went.
        self._grammar: Grammar | None = None
        self._examined = 0
        self._found: Message | Malformed | None = None
        #: Whether `next` stopped to give others a turn, and should be called again without more data.
        self.busy = False

    @property
    def pending(self) -> int:
        """Bytes that were fed and are not part of a message yet that was returned."""
        return len(self._chunk) or len(self._buffer) - self._start

    @property
    def offset(self) -> int:
        """Bytes of the stream up to the end of the last message."""
        return self._origin + self._start

    def feed(self, data: bytes) -> None:
        """Add bytes as they came."""
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
        self._pass(data, len(data))
        return match.groups()

    def take(self, pattern: re.Pattern[bytes]) -> tuple[bytes | None, ...] | None:
        """What the pattern captures of the next message, if that is one that it describes; otherwise ask `next`."""
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
        """The next message, or what is wrong with it; None if more bytes must come first, or if `busy`."""
        if self._chunk:
            chunk, self._chunk = self._chunk, b""
            message = self._at_once(chunk)
            if message is not None:
                return message
            self._buffer += chunk
        self._found = None
        self.busy = all(self._step() for _ in range(limits.STEPS_PER_TURN))
        return None if self.busy else self._outcome()

    def _at_once(self, chunk: bytes) -> Message | None:
        """The chunk, if it is one whole message that QEMU and msgspec read alike."""
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
        self._pass(chunk, len(chunk))
        return message

    def _pass(self, chunk: bytes, end: int) -> None:
        """Count what never was in the buffer."""
        self._origin += end
        if self._dialect.eager:
            self._places.drop(chunk, end)

    def _outcome(self) -> Message | Malformed | None:
        if self._found is None:
            self._wait()
        if self._found is None or self._start > limits.RECEIVE_SIZE:
            self._forget()
        return self._found

    def _step(self) -> bool:
        """Scan some more. False when something was found, or when the data has ended."""
        if self._mode is _Mode.TOKEN:
            return self._run() if self._braces or self._brackets else self._first()
        return self._string() if self._mode is _Mode.STRING else self._skip()

    # From bracket to bracket.

    def _first(self) -> bool:
        """The first token of a message. If it opens nothing, it is all of the message."""
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
        """Brackets and all between them, until a message ends or a token needs attention."""
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
        """A token that stopped the run: in single quotes, wrong, or cut by the end of the data."""
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
        if not self._muted:
            token = bytes(buffer[self._token : end + 1])
            if self._quote == _APOSTROPHE or b"\\'" in token:
                self._edits.append((self._token, end + 1, requote(token)))
        return self._token_ended(end + 1)

    def _atom(self) -> bool:
        """A number or keyword, or what starts like one."""
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
            self._split = True
        more = self._token_ended(end)
        self._resumed = self._origin + end
        return more

    def _token_ended(self, end: int) -> bool:
        self._position = end
        return True if self._braces or self._brackets else self._complete()

    def _skip(self) -> bool:
        """What QEMU's lexer ignores after an error."""
        self._position = self._start = _end(SKIPPED, self._buffer, self._position)
        if self._start == len(self._buffer):
            return False
        self._mode = _Mode.TOKEN
        self._resumed = self._origin + self._start
        return True

    # The ends that a message can have.

    def _complete(self) -> bool:
        """The message has ended where it should."""
        if not self._muted:
            self._found = self._message()
        self._reset(self._position)
        return self._found is None

    def _message(self) -> Message | Malformed:
        size = self._position - self._start
        message = self._parsed()
        if message is not None and (
            message.doubt is Doubt.NONE or (message.doubt is Doubt.CONTENT and size > _EXAMINED)
        ):
            return message
        problem = self._problem(self._position, _EXAMINED if message is None else _EXAMINED_MEMBERS)
        if problem is not None:
            return Malformed(problem)
        if message is None or size > _EXAMINED_MEMBERS:
            return Malformed(f"{self._place(self._start)}JSON parse error, expecting value")
        return Message(message.text, message.members, Doubt.NONE)

    def _parsed(self) -> Message | None:
        """What msgspec makes of the message, or None if it does not take it for JSON or should not."""
        if self._split:
            return None
        text = self._edited() if self._edits else bytes(self._buffer[self._start : self._position])
        try:
            return parse(text if text.isascii() else _NUL.sub(rb"\\u0000", text))
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None

    def _edited(self) -> bytes:
        """The message with its strings rewritten."""
        pieces: list[bytes | bytearray] = []
        position = self._start
        for start, end, replacement in self._edits:
            pieces += (self._buffer[position:start], replacement)
            position = end
        return b"".join((*pieces, self._buffer[position : self._position]))

    def _error(self, start: int, end: int, description: str = "") -> bool:
        """A lexical error ends the message, however many brackets are open."""
        if not self._muted:
            problem = self._problem(start) if self._dialect.eager else None
            stray = f"{self._place(start)}JSON parse error, stray '{lenient(bytes(self._buffer[start:end]))}'"
            self._found = Malformed(problem or description or stray)
        self._reset(end)
        self._mode = _Mode.SKIPPING
        return self._found is None

    def _too_deep(self) -> bool:
        if self._muted:
            return True
        problem = self._problem(self._position - 1) if self._dialect.eager else None
        self._found = Malformed(problem or _TOO_DEEP)
        if self._dialect.eager:
            self._mute()
        else:
            self._reset(self._position)
        return False

    def _wait(self) -> None:
        """The data has ended within a message; what can be said of it already?"""
        if self._muted:
            self._mute()
        elif len(self._buffer) - self._start > limits.COMMAND_SIZE:
            self._found = Malformed(_TOO_LARGE)
            self._mute()
        elif self._dialect.eager and (self._braces or self._brackets):
            problem = self._problem(self._token if self._mode is _Mode.STRING else self._position)
            if problem is not None:
                self._found = Malformed(problem)
                self._mute()

    def _mute(self) -> None:
        """Follow the rest of the message without keeping or reporting it."""
        self._muted = True
        self._start = self._position
        self._edits.clear()

    def _reset(self, position: int) -> None:
        """A message starts here."""
        self._start = self._position = position
        self._braces = self._brackets = 0
        self._split = self._muted = False
        self._grammar = None
        if self._edits:
            self._edits = []

    # What is wrong with it.

    def _problem(self, end: int, limit: int = _EXAMINED) -> str | None:
        """The first error of the message before `end`, if it is among the first `limit` bytes."""
        if self._grammar is None:
            self._grammar, self._examined = Grammar(self._dialect), self._start
        for token in tokens(self._buffer, self._examined, end):
            if token.start() - self._start > limit:
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
        late = self._origin + offset == self._resumed or self._buffer[max(0, offset - 1) : offset].isalnum()
        return self._places.name(self._buffer, offset, late=late)

    def _forget(self) -> None:
        """Let go of what is done with."""
        start = self._start
        if not start:
            return
        if self._dialect.eager:
            self._places.drop(self._buffer, start)
        del self._buffer[:start]
        self._origin += start
        self._position -= start
        self._token -= start
        self._examined -= start
        self._edits = [(first - start, end - start, text) for first, end, text in self._edits]
        self._start = 0


def _end(pattern: re.Pattern[bytes], buffer: bytearray, position: int) -> int:
    """Where a match ends; the patterns match everywhere."""
    match = pattern.match(buffer, position)
    assert match is not None
    return match.end()

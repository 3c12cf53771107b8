# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds the first error of a message that is not JSON, as QEMU's parser reports it (qobject/json-parser.c).

Usual messages do not need this parser. It is fed tokens, so it needs no recursion and can stop and resume anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum, auto

from .dialect import Dialect
from .strings import BadString, value_of

#: A token that QEMU's lexer accepts. A number ends where it ends for QEMU: `0e5` is three tokens.
_TOKEN = re.compile(
    rb"""[\[\]{}:,]
      |"(?:[^"\\]++|\\.)*+"
      |'(?:[^'\\]++|\\.)*+'
      |-?+(?:0(?:\.[0-9]++(?:[eE][-+]?+[0-9]++)?)?|[1-9][0-9]*+(?:\.[0-9]++)?(?:[eE][-+]?+[0-9]++)?)
      |[a-z]++""",
    re.VERBOSE | re.DOTALL,
)

_KEYWORDS = frozenset((b"true", b"false", b"null"))


class _Expect(Enum):
    """The kind of token that may come next."""

    VALUE = auto()
    FIRST_VALUE = auto()  # or the end of the array
    KEY = auto()
    FIRST_KEY = auto()  # or the end of the object
    COLON = auto()
    SEPARATOR = auto()  # or the end of the object or array
    NOTHING = auto()


class _Object:
    """An open object: its keys, and the key of the next value, which is None if the key is not a string."""

    __slots__ = ("key", "keys")

    def __init__(self) -> None:
        self.key: str | None = ""
        self.keys: set[str] = set()


class SyntaxProblem(ValueError):
    """A token that is not valid at its place. The error has QEMU's text."""


class Grammar:
    """Checks the tokens of one message in order."""

    __slots__ = ("_dialect", "_expect", "_open")

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._expect = _Expect.VALUE
        # The open objects and arrays (None), the innermost last.
        self._open: list[_Object | None] = []

    def feed(self, token: bytes) -> None:
        """Check the next token. Raises SyntaxProblem if it is not valid there."""
        match self._expect:
            case _Expect.FIRST_VALUE if token == b"]":
                self._close()
            case _Expect.FIRST_KEY if token == b"}":
                self._close()
            case _Expect.VALUE | _Expect.FIRST_VALUE:
                self._value(token)
            case _Expect.KEY | _Expect.FIRST_KEY:
                self._key(token)
            case _Expect.COLON:
                self._require(token == b":", self._dialect.colon)
                self._expect = _Expect.VALUE
            case _Expect.SEPARATOR:
                self._separator(token)
            case _Expect.NOTHING:
                raise SyntaxProblem("expecting value")

    def _require(self, condition: bool, problem: str) -> None:
        if not condition:
            raise SyntaxProblem(problem)

    def _value(self, token: bytes) -> None:
        first = token[:1]
        if first == b"{":
            self._open.append(_Object())
            self._expect = _Expect.FIRST_KEY
        elif first == b"[":
            self._open.append(None)
            self._expect = _Expect.FIRST_VALUE
        else:
            self._scalar(token)
            self._complete()

    def _scalar(self, token: bytes) -> None:
        if token in b"]}:,":
            raise SyntaxProblem("expecting value")
        if token[:1] in (b'"', b"'"):
            _string(token)
        elif token.isalpha() and token not in _KEYWORDS:
            raise SyntaxProblem(f"invalid keyword '{token.decode('ascii')}'")

    def _key(self, token: bytes) -> None:
        innermost = self._open[-1]
        assert innermost is not None
        if token[:1] in (b'"', b"'"):
            innermost.key = _string(token)
            self._expect = _Expect.COLON
        elif self._dialect.is_eager:
            raise SyntaxProblem(self._dialect.key)
        else:
            # The older parser reads a value, and only then notices that it is not a string.
            innermost.key = None
            self._value(token)

    def _separator(self, token: bytes) -> None:
        innermost = self._open[-1]
        if innermost is None:
            if token == b"]":
                return self._close()
            self._require(token == b",", self._dialect.array_separator)
            self._expect = _Expect.VALUE
        else:
            if token == b"}":
                return self._close()
            self._require(token == b",", self._dialect.object_separator)
            self._expect = _Expect.KEY

    def _close(self) -> None:
        self._open.pop()
        self._complete()

    def _complete(self) -> None:
        """Continue after the end of a value, which is an element, a member, or the message."""
        if not self._open:
            self._expect = _Expect.NOTHING
            return
        self._expect = _Expect.SEPARATOR
        innermost = self._open[-1]
        if innermost is not None:
            if innermost.key is None:
                raise SyntaxProblem(self._dialect.key)
            self._require(innermost.key not in innermost.keys, "duplicate key")
            innermost.keys.add(innermost.key)


def _string(token: bytes) -> str:
    try:
        return value_of(token)
    except BadString as problem:
        raise SyntaxProblem(str(problem)) from None


def tokens(text: bytes | bytearray, start: int, end: int) -> Iterator[re.Match[bytes]]:
    """Yield the tokens of a text that QEMU's lexer accepts."""
    return _TOKEN.finditer(text, start, end)

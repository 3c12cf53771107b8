# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads and writes JSON strings as QEMU does.

Reading accepts single and double quotes, the additional escape `\\'`, and modified UTF-8 (NUL may be C0 80); it refuses
code points that are not characters (util/unicode.c). Writing uses double quotes, and escapes all but ASCII as `\\uXXXX`
with capital digits (qobject/json-writer.c).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

#: QEMU's replacement for bytes that are not UTF-8.
REPLACEMENT = "\ufffd"

_ESCAPES = {
    b'"': '"',
    b"'": "'",
    b"\\": "\\",
    b"/": "/",
    b"b": "\b",
    b"f": "\f",
    b"n": "\n",
    b"r": "\r",
    b"t": "\t",
}
_WRITTEN = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}

#: A piece of a string's inside: text, an escaped surrogate pair, another unicode escape (which the end of the string
#: may cut), or an escaped letter.
_PIECE = re.compile(
    rb"([^\\]+)|\\(?:u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})|u(.{0,4})|(.))",
    re.DOTALL,
)
_HEXADECIMAL = re.compile(rb"[0-9a-fA-F]{4}")
_SPECIAL = re.compile(r'["\\]|[^ -~]')
_QUOTES = re.compile(rb"""\\(.)|(")""", re.DOTALL)

#: The smallest code points that need two, three … bytes. A longer sequence than needed is overlong.
_SMALLEST = (0x80, 0x800, 0x10000, 0x200000, 0x4000000)


class BadString(ValueError):
    """A string that QEMU's parser refuses. The error has QEMU's text."""


def quote(text: str) -> bytes:
    """Return a string as QEMU writes it, quotes included."""
    return b'"' + _SPECIAL.sub(_written, text).encode("ascii") + b'"'


def _written(match: re.Match[str]) -> str:
    character = match[0]
    if character in _WRITTEN:
        return _WRITTEN[character]
    code = ord(character)
    if code > 0xFFFF:
        code -= 0x10000
        return f"\\u{0xD800 + (code >> 10):04X}\\u{0xDC00 + (code & 0x3FF):04X}"
    return f"\\u{code:04X}"


def requote(token: bytes) -> bytes:
    """Return a string token in standard JSON: double quotes, no `\\'`. Its value stays the same."""
    inside = token[1:-1]
    if b"\\" in inside or b'"' in inside:
        inside = _QUOTES.sub(_requoted, inside)
    return b'"' + inside + b'"'


def _requoted(match: re.Match[bytes]) -> bytes:
    if match[2]:
        return b'\\"'
    return b"'" if match[1] == b"'" else match[0]


def lenient(data: bytes) -> str:
    """Return bytes as QEMU shows them in an error: up to a NUL, with U+FFFD for each invalid sequence."""
    return "".join(REPLACEMENT if code < 0 else chr(code) for code in _code_points(data.partition(b"\0")[0]))


def value_of(token: bytes) -> str:
    """Return the value of a string token. Raises BadString with QEMU's description if it has none."""
    inside = token[1:-1]
    if inside.isascii() and b"\\" not in inside:
        return inside.decode("ascii")
    return "".join(_unescaped(piece, token[-1:]) for piece in _PIECE.finditer(inside))


def _unescaped(piece: re.Match[bytes], quotation: bytes) -> str:
    text, high, low, single, letter = piece.groups()
    if text is not None:
        return _decoded(text)
    if letter is not None:
        if letter not in _ESCAPES:
            raise BadString("invalid escape sequence in string")
        return _ESCAPES[letter]
    if high is not None:
        code = 0x10000 + ((int(high, 16) & 0x3FF) << 10) + (int(low, 16) & 0x3FF)
    else:
        code = int(single, 16) if _HEXADECIMAL.fullmatch(single) else -1
    if not _is_character(code):
        # QEMU shows four bytes of the escape, even if one of them is the closing quote.
        shown = lenient(piece[0] if high is not None or len(single) == 4 else piece[0] + quotation)
        raise BadString(f"{shown} is not a valid Unicode character")
    return chr(code)


def _decoded(text: bytes) -> str:
    if text.isascii():
        return text.decode("ascii")
    codes = list(_code_points(text))
    if min(codes) < 0:
        raise BadString("invalid UTF-8 sequence in string")
    return "".join(map(chr, codes))


def _is_character(code: int) -> bool:
    """Return whether QEMU accepts a code point: it refuses surrogates and Unicode's noncharacters."""
    if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF or 0xFDD0 <= code <= 0xFDEF:
        return False
    return code >= 0 and code & 0xFFFE != 0xFFFE


def _code_points(data: bytes) -> Iterator[int]:
    """Yield the code points of modified UTF-8, -1 for an invalid sequence (util/unicode.c, mod_utf8_codepoint)."""
    position = 0
    while position < len(data):
        code, length = _code_point(data, position)
        position += length
        yield code


def _code_point(data: bytes, position: int) -> tuple[int, int]:
    """Return the code point at `position`, or -1, and the number of its bytes."""
    lead = data[position]
    if lead < 0x80:
        return lead, 1
    if lead < 0xC0 or lead >= 0xFE:
        return -1, 1
    length = 8 - (~lead & 0xFF).bit_length()
    code = lead & (0x7F >> length)
    for taken in range(1, length):
        byte = data[position + taken] if position + taken < len(data) else 0
        if byte & 0xC0 != 0x80:
            return -1, taken
        code = code << 6 | byte & 0x3F
    overlong = code < _SMALLEST[length - 2] and not (code == 0 and length == 2)
    return (-1 if overlong or not _is_character(code) else code), length

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writes the `id` of a command as QEMU echoes it: by its value, not by its text."""

from __future__ import annotations

import re

from .grammar import tokens
from .qdict_order import by_bucket
from .strings import quote, value_of

#: Ids that QEMU echoes unchanged.
_UNCHANGED = re.compile(rb'"[ !#-\[\]-~]*"|-?[1-9][0-9]{0,17}|0|null|true|false')

#: The maximum size of an id that is rewritten token by token. In a larger id, only characters beyond ASCII are escaped.
_REWRITTEN = 4096

_NOT_ASCII = re.compile("[^\x00-\x7f]+")


def echoed(text: bytes) -> bytes:
    """Return an id as it is in a reply. `text` is compact JSON. Raises BadString for a string that QEMU refuses."""
    if _UNCHANGED.fullmatch(text):
        return text
    if len(text) <= _REWRITTEN:
        return _rewritten(text)
    if text.isascii():
        return text
    return _NOT_ASCII.sub(lambda match: quote(match[0])[1:-1].decode("ascii"), text.decode(errors="replace")).encode()


def _rewritten(text: bytes) -> bytes:
    """Return JSON as QEMU writes it. A list takes the place of recursion: QEMU allows deeper nesting than Python."""
    opened: list[list[bytes]] = [[]]
    for match in tokens(text, 0, len(text)):
        token = match[0]
        if token in b"[{":
            opened.append([])
        elif token == b"]":
            elements = opened.pop()
            opened[-1].append(b"[" + b", ".join(elements) + b"]")
        elif token == b"}":
            pairs = opened.pop()
            opened[-1].append(_object(dict(zip(pairs[::2], pairs[1::2], strict=True))))
        elif token not in b",:":
            opened[-1].append(_scalar(token))
    return opened[0][0]


def _object(members: dict[bytes, bytes]) -> bytes:
    keys = {value_of(key): key for key in members}
    ordered = [keys[key] for key in by_bucket(keys)]
    return b"{" + b", ".join(b"%b: %b" % (key, members[key]) for key in ordered) + b"}"


def _scalar(token: bytes) -> bytes:
    if token[:1] == b'"':
        return quote(value_of(token))
    return _number(token) if token[0] in b"-0123456789" else token


def _number(token: bytes) -> bytes:
    """Return a number as QNum writes it, after reading it as int64, else uint64, else double (qobject/qnum.c)."""
    if token.lstrip(b"-").isdigit() and len(token) <= 20:
        value = int(token)
        if -(1 << 63) <= value < 1 << 64:
            return b"%d" % value
    number = float(token)
    # QEMU writes `inf`, which no client can parse; the number is kept instead.
    return token if number in (float("inf"), float("-inf")) else b"%.17g" % number

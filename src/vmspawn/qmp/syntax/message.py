# SPDX-License-Identifier: LGPL-2.1-or-later
"""Splits a message into compact JSON text and the members of its object, still as text.

msgspec does the work, in C. It accepts what QEMU accepts but for what is looked after here: it allows less nesting, it
keeps the last of two members with the same key where QEMU refuses both, and it does not look into strings.
"""

from __future__ import annotations

import re
import sys
from enum import Enum, auto

import msgspec

from .. import limits

_MEMBERS = msgspec.json.Decoder(dict[str, msgspec.Raw])

#: A brace, or a string and the colon behind it if it is a key.
_KEYS = re.compile(rb'[{}]|("[^"]*+")(:)?')

#: Bytes of a message in which keys that occur twice in one object are searched for. In larger ones QEMU may find them.
SEARCHED = 2048


class Doubt(Enum):
    """The errors that only the tokens can show."""

    NONE = auto()
    #: Strings that are not Unicode, and keys that occur twice further in. QEMU can find them as well.
    CONTENT = auto()
    #: Members that others took the place of, for only their keys' spelling differs or not even that.
    MEMBERS = auto()


class Message(msgspec.Struct, frozen=True, gc=False):
    """A message that is JSON."""

    #: Compact: no white space.
    text: bytes
    #: Its members in compact JSON, or None if it is no object.
    members: dict[str, msgspec.Raw] | None
    doubt: Doubt


def parse(text: bytes | bytearray) -> Message:
    """Compact a message and take it apart. Raises msgspec.DecodeError or UnicodeDecodeError if it is not JSON."""
    try:
        return _parse(text)
    except RecursionError:
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(limit + 2 * limits.NESTING)
        try:
            return _parse(text)
        finally:
            sys.setrecursionlimit(limit)


def _parse(text: bytes | bytearray) -> Message:
    compact: bytes = msgspec.json.format(text, indent=-1)
    plain = compact.isascii() and b"\\" not in compact
    if compact[0] != 0x7B:
        return Message(compact, None, Doubt.NONE if plain else Doubt.CONTENT)
    members = _MEMBERS.decode(compact)
    # The length shows whether a member is missing that another took the place of, and whether keys have escapes.
    length = 1
    for key, value in members.items():
        length += len(key) + len(value) + 4
    if length != len(compact):
        return Message(compact, members, Doubt.MEMBERS)
    return Message(compact, members, Doubt.NONE if plain and _unique(compact, members) else Doubt.CONTENT)


def _unique(compact: bytes, members: dict[str, msgspec.Raw]) -> bool:
    """Whether no object in a message without escapes has a key twice, as far as a cheap check can tell."""
    # A colon a key: with more of them there are keys further in, or colons in strings.
    further = compact.count(b":") - len(members)
    if not further:
        return True
    try:
        if further == len(_MEMBERS.decode(members.get("arguments", b"{}"))):
            return True
    except msgspec.ValidationError:
        pass
    return len(compact) <= SEARCHED and _search(compact)


def _search(compact: bytes) -> bool:
    """Whether no object in the message has a key twice. Without recursion; some 0.3 us a string."""
    objects: list[set[bytes]] = []
    for match in _KEYS.finditer(compact):
        if match.lastindex == 2:
            if match[1] in objects[-1]:
                return False
            objects[-1].add(match[1])
        elif match.lastindex is None:
            if match[0] == b"{":
                objects.append(set())
            else:
                objects.pop()
    return True

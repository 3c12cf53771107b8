# SPDX-License-Identifier: LGPL-2.1-or-later
"""Splits a message into compact JSON text and the members of its object, still as text.

msgspec does the work, in C. It differs from QEMU in three ways, which are handled here: it allows less nesting; of two
members with the same key it keeps the last, while QEMU refuses the message; and it does not check the contents of
strings.
"""

from __future__ import annotations

import re
import sys
from enum import Enum, auto

import msgspec

from .. import limits

_MEMBERS = msgspec.json.Decoder(dict[str, msgspec.Raw])

#: A brace, or a string and the colon after it if the string is a key.
_KEYS = re.compile(rb'[{}]|("[^"]*+")(:)?')

#: Bytes of a message up to which nested objects are searched for duplicate keys. In a larger message, that is left to
#: QEMU.
SEARCHED = 2048


class Doubt(Enum):
    """The errors that a message may have, and that only its tokens can show."""

    NONE = auto()
    #: Strings that are not Unicode, and duplicate keys in nested objects. QEMU can find these errors too.
    CONTENT = auto()
    #: Duplicate keys in the message's own object, perhaps with different escapes. msgspec has dropped the first value.
    MEMBERS = auto()


class Message(msgspec.Struct, frozen=True, gc=False):
    """A message that is JSON."""

    #: Compact JSON, without white space.
    text: bytes
    #: The members in compact JSON, or None if the message is not an object.
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
    # The length shows whether a duplicate member was dropped, and whether keys have escapes.
    length = 1
    for key, value in members.items():
        length += len(key) + len(value) + 4
    if length != len(compact):
        return Message(compact, members, Doubt.MEMBERS)
    return Message(compact, members, Doubt.NONE if plain and _unique(compact, members) else Doubt.CONTENT)


def _unique(compact: bytes, members: dict[str, msgspec.Raw]) -> bool:
    """Return True if a cheap check shows that no object has a duplicate key. The message has no escapes."""
    # Each key has a colon. More colons than members mean nested keys, or colons in strings.
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
    """Return True if no object in the message has a duplicate key. Needs no recursion, and 0.3 µs a string."""
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

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Distinguishes the two ways in which QEMU's JSON parsers report errors.

Up to a version between 7.2 and 11.1 the parser waits for a message's end and then descends into it. Since then it is
fed token by token, reports an error at once with its place in the stream, and ignores the rest of the message. Both
find the same messages right, and both report one error a message. Which one it is shows in QEMU's answer to a stray
bracket.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

#: What QEMU is sent to find out, before the negotiation: the shortest message that it cannot parse.
PROBE = b"]"

_PLACE = re.compile(r"\d+:\d+: ")


@dataclass(frozen=True, slots=True)
class Dialect:
    """The wording of errors, and when they are reported."""

    #: Errors are reported as soon as they are seen, and say where: `LINE:COLUMN: JSON parse error, …`.
    eager: bool
    key: str
    colon: str
    object_separator: str
    array_separator: str


#: QEMU 7.2.
PULL = Dialect(
    eager=False,
    key="key is not a string in object",
    colon="missing : in object pair",
    object_separator="expected separator in dict",
    array_separator="expected separator in list",
)

#: QEMU 11.1.
PUSH = Dialect(
    eager=True,
    key="expecting key",
    colon="expecting ':'",
    object_separator="expected ',' or '}'",
    array_separator="expected ',' or ']'",
)


def dialect_of(description: str) -> Dialect:
    """Return the dialect of a QEMU that answered PROBE with this error."""
    return PUSH if _PLACE.match(description) else PULL

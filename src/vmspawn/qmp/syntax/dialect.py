# SPDX-License-Identifier: LGPL-2.1-or-later
"""Distinguishes the two ways in which QEMU's JSON parsers report errors.

Up to a version between 7.2 and 11.1, the parser waits for the end of a message and then descends into it. Later parsers
are fed token by token, report an error at once with its position in the stream, and ignore the rest of the message.
Both accept the same messages, and both report one error a message. QEMU's reply to a stray bracket shows the kind of
parser.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

#: The probe that is sent before the negotiation: the shortest message that QEMU cannot parse.
PROBE = b"]"

_POSITION = re.compile(r"\d+:\d+: ")


@dataclass(frozen=True, slots=True)
class Dialect:
    """The wording of errors, and when they are reported."""

    #: True if errors are reported at once, with a position: `LINE:COLUMN: JSON parse error, …`.
    is_eager: bool
    key: str
    colon: str
    object_separator: str
    array_separator: str


#: QEMU 7.2.
PULL = Dialect(
    is_eager=False,
    key="key is not a string in object",
    colon="missing : in object pair",
    object_separator="expected separator in dict",
    array_separator="expected separator in list",
)

#: QEMU 11.1.
PUSH = Dialect(
    is_eager=True,
    key="expecting key",
    colon="expecting ':'",
    object_separator="expected ',' or '}'",
    array_separator="expected ',' or ']'",
)


def dialect_of(description: str) -> Dialect:
    """Return the dialect of a QEMU that replied to PROBE with this error."""
    return PUSH if _POSITION.match(description) else PULL

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the tokens of QEMU's JSON dialect as regular expressions (qobject/json-lexer.c)."""

from __future__ import annotations

import re

#: White space between tokens.
WHITESPACE = re.compile(rb"[ \t\r\n]*+")

#: Tokens that need no inspection, then the next bracket if one follows. The match stops before other tokens: single
#: quotes, `\'` (an escape that only QEMU accepts), numbers that are several tokens for QEMU (`0e5`), and a number or
#: keyword that the end of the data may have cut. The last alternative never matches. It works around CPython issue
#: 106052: before Python 3.11.5, a possessive repeat continues at the end of its last, failed attempt.
RUN = re.compile(
    rb"""(?:[ \t\r\n,:]++
         |"(?:[^"\\\x00-\x1f\xfe\xff]++|\\[^'\x00-\x1f\xfe\xff])*+"
         |-?+(?:0(?![0-9eE])|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][-+]?+[0-9]++)?(?![0-9.eE])(?=[\s\S])
         |[a-z]++(?=[\s\S])
         |(?!)
         )*+([\[\]{}])?+""",
    re.VERBOSE,
)

#: The inside of a string, up to its closing quote, an invalid character, or the end of the data.
INSIDE = {
    ord('"'): re.compile(rb'(?:[^"\\\x00-\x1f\xfe\xff]++|\\[^\x00-\x1f\xfe\xff])*+'),
    ord("'"): re.compile(rb"(?:[^'\\\x00-\x1f\xfe\xff]++|\\[^\x00-\x1f\xfe\xff])*+"),
}

#: A number or keyword, complete or not.
ATOM = re.compile(
    rb"""[a-z]++
      |-?+(?:0(?:\.(?:[0-9]++(?:[eE][-+]?+[0-9]*+)?)?)?
         |[1-9][0-9]*+(?:\.(?:[0-9]++(?:[eE][-+]?+[0-9]*+)?)?|[eE][-+]?+[0-9]*+)?)?""",
    re.VERBOSE,
)

#: The bytes that QEMU's lexer skips after a lexical error.
SKIPPED = re.compile(rb"[^\x00-\x08\x0a-\x1f\xfe\xff\[\]{}:,]*+")

#: The first bytes of numbers and keywords.
ATOM_STARTS = b"-0123456789abcdefghijklmnopqrstuvwxyz"

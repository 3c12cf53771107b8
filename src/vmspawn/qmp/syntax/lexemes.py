# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the tokens of QEMU's JSON dialect as regular expressions (qobject/json-lexer.c)."""

from __future__ import annotations

import re

#: What may stand between tokens.
WHITESPACE = re.compile(rb"[ \t\r\n]*+")

#: Tokens that need no attention, then the next bracket if one follows. Left out, so that the match stops before them:
#: single quotes, `\'` (which only QEMU has), numbers that QEMU takes for two tokens (`0e5`), and a number or keyword
#: that the end of the data may have cut. The last alternative, which never matches, is for Python before 3.11.5: there
#: a possessive repeat goes on from wherever its last, failed attempt got to (CPython issue 106052), and this puts it
#: back.
RUN = re.compile(
    rb"""(?:[ \t\r\n,:]++
         |"(?:[^"\\\x00-\x1f\xfe\xff]++|\\[^'\x00-\x1f\xfe\xff])*+"
         |-?+(?:0(?![0-9eE])|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][-+]?+[0-9]++)?(?![0-9.eE])(?=[\s\S])
         |[a-z]++(?=[\s\S])
         |(?!)
         )*+([\[\]{}])?+""",
    re.VERBOSE,
)

#: What a string may hold before its closing quote, a character that must not be there, or the end of the data.
INSIDE = {
    ord('"'): re.compile(rb'(?:[^"\\\x00-\x1f\xfe\xff]++|\\[^\x00-\x1f\xfe\xff])*+'),
    ord("'"): re.compile(rb"(?:[^'\\\x00-\x1f\xfe\xff]++|\\[^\x00-\x1f\xfe\xff])*+"),
}

#: As much of a number or keyword as there is, complete or not.
ATOM = re.compile(
    rb"""[a-z]++
      |-?+(?:0(?:\.(?:[0-9]++(?:[eE][-+]?+[0-9]*+)?)?)?
         |[1-9][0-9]*+(?:\.(?:[0-9]++(?:[eE][-+]?+[0-9]*+)?)?|[eE][-+]?+[0-9]*+)?)?""",
    re.VERBOSE,
)

#: Skipped after a lexical error, up to where QEMU's lexer resumes.
SKIPPED = re.compile(rb"[^\x00-\x08\x0a-\x1f\xfe\xff\[\]{}:,]*+")

#: What numbers and keywords begin with.
ATOM_STARTS = b"-0123456789abcdefghijklmnopqrstuvwxyz"

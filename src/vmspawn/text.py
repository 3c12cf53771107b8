# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes untrusted text safe to print.

A file name may contain any byte but NUL and the slash, and a guest prints any byte. Some control sequences make a
terminal answer, so that the shell would read the answer as if the user had typed it.
"""

from __future__ import annotations

import re
from typing import Any

#: Control sequences (ECMA-48 and ECMA-35), as text: colours, cursor movements and queries ("CSI"), control strings such
#: as a window's title, and short sequences. It is compiled at its first use, because most starts do not use it.
_CONTROL_SEQUENCE = (
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]"
    r"|[P\]X^_][^\x07\x1b\n]*(?:\x07|\x1b\\)"
    r"|[ -/]*[0-OQ-WYZ\\`-~])"
)


def utf8(text: str) -> str:
    """Return the text, with each byte that is not valid UTF-8 escaped as in `\\xff`, so that it can be encoded."""
    try:
        return text.encode(errors="surrogateescape").decode(errors="backslashreplace")
    except UnicodeEncodeError:
        # JSON can have surrogates that stand for no byte.
        return text.encode(errors="backslashreplace").decode()


def printable(text: str) -> str:
    """Return the text as one line that is safe on a terminal, with control characters escaped as `\\n` or `\\x1b`."""
    text = utf8(text)
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def console_lines(output: str) -> list[str]:
    """Return the lines of a console's output, safe on a terminal and without spaces at their ends.

    Control sequences are removed, tabs are expanded, and other control characters are escaped.
    """
    text = re.sub(_CONTROL_SEQUENCE, "", re.sub(r"\r+\n", "\n", output)).rstrip()
    return [printable(line.expandtabs()).rstrip() for line in text.split("\n")] if text else []


def short_repr(fields: Any) -> str:
    """Return the repr of a named tuple without the fields that have their default values."""
    defaults = fields._field_defaults
    shown = (
        f"{name}={value!r}"
        for name, value in zip(fields._fields, fields, strict=True)
        if name not in defaults or value != defaults[name]
    )
    return f"{type(fields).__name__}({', '.join(shown)})"

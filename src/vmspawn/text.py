# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes untrusted text safe to print. A file name may contain any byte but NUL and the slash."""

from __future__ import annotations

from typing import Any


def utf8(text: str) -> str:
    """Return the text, with each byte that is not valid UTF-8 escaped as in `\\xff`, so that it can be encoded."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


def printable(text: str) -> str:
    """Return the text as one line that is safe on a terminal, with control characters escaped as `\\n` or `\\x1b`."""
    text = utf8(text)
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def short_repr(fields: Any) -> str:
    """Return the repr of a named tuple without the fields that have their default values."""
    defaults = fields._field_defaults
    shown = (
        f"{name}={value!r}"
        for name, value in zip(fields._fields, fields, strict=True)
        if name not in defaults or value != defaults[name]
    )
    return f"{type(fields).__name__}({', '.join(shown)})"

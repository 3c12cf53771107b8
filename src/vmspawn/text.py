# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes untrusted text safe to print. A file name may contain any byte but NUL and the slash."""


def utf8(text: str) -> str:
    """Return the text with each byte that is not UTF-8 as `\\xff`; Python's stand-ins for them cannot be encoded."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


def printable(text: str) -> str:
    """Return the text as one line that is harmless to a terminal: control characters become `\\n` or `\\x1b`."""
    text = utf8(text)
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Text of others, file names above all, in lines and messages of ours: a name may have any byte but two."""


def utf8(text: str) -> str:
    """The text with bytes that are no UTF-8 written as `\\xff`: as Python has them, nothing could encode it."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


def printable(text: str) -> str:
    """The text as one line that does nothing to a terminal: what is not printable is written as `\\n` or `\\x1b`."""
    text = utf8(text)
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)

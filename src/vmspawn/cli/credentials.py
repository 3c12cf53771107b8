# SPDX-License-Identifier: LGPL-2.1-or-later
"""Parses credentials as systemd's tools do: ID:VALUE with C's escapes, and ID:PATH."""

from __future__ import annotations

import os
import re

from ..boot.credentials import Credential
from ..errors import UsageError

#: systemd's CREDENTIAL_NAME_MAX.
_NAME_MAX = 255


def parse_set(text: str) -> Credential:
    """Parse `--set-credential=ID:VALUE`, with C's escapes in the value. Raises UsageError."""
    name, colon, value = text.partition(":")
    if not colon:
        raise UsageError.with_fields(
            "{set_credential={text}} has no value", hint="write {set_credential=}ID:VALUE", text=text
        )
    return Credential(_check_name("set_credential", name), unescape("set_credential", value))


def parse_load(text: str) -> Credential:
    """Parse `--load-credential=ID:PATH`. Raises UsageError.

    A path without a slash names a credential that the service manager passed to vmspawn, if it passed any.
    """
    name, colon, path = text.partition(":")
    if not colon or not path:
        raise UsageError.with_fields(
            "{load_credential={text}} names no file", hint="write {load_credential=}ID:PATH", text=text
        )
    _check_name("load_credential", name)
    if not os.path.isabs(path):
        given = "" if "/" in path else os.environ.get("CREDENTIALS_DIRECTORY", "")
        path = os.path.abspath(os.path.join(given, path))
    return Credential(name, path=path)


def _check_name(field: str, name: str) -> str:
    if (
        not 0 < len(name) <= _NAME_MAX
        or "/" in name
        or name in (".", "..")
        or not (name.isascii() and name.isprintable())
    ):
        template = "{" + field + "={text}} is not a credential name"
        raise UsageError.with_fields(template, hint="use printable ASCII without slashes", text=name)
    return name


_SIMPLE = {"a": 7, "b": 8, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11, "\\": 92, '"': 34, "'": 39, "s": 32}
_ESCAPE = r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{3}|[abfnrtv\\\"'s]|)"


def unescape(field: str, text: str) -> bytes:
    """Convert C escapes in text to bytes, as systemd does. Raises UsageError."""
    parts: list[bytes] = []
    position = 0
    for match in re.finditer(_ESCAPE, text, re.DOTALL):
        parts += [os.fsencode(text[position : match.start()]), _character(field, text, match[1])]
        position = match.end()
    return b"".join((*parts, os.fsencode(text[position:])))


def _character(field: str, text: str, escape: str) -> bytes:
    try:
        if not escape:
            raise ValueError
        if escape[0] in "uU":
            return chr(int(escape[1:], 16)).encode()
        if escape[0] == "x":
            return bytes((int(escape[1:], 16),))
        return bytes((_SIMPLE[escape] if escape in _SIMPLE else int(escape, 8),))
    except (ValueError, OverflowError):
        template = "{" + field + "={text}}: invalid escape sequence"
        hint = r"write \\ for a backslash, \n, \x00 and so on"
        raise UsageError.with_fields(template, hint=hint, text=text) from None

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Parses the values of options: sizes, numbers, booleans.

Python's `int` and `float` accept texts that users do not mean as numbers: `4_0`, digits of other scripts, `1e3`, `nan`.
"""

from __future__ import annotations

import argparse
import re

from ..errors import UsageError
from ..sizes import SIZE_HINT, bytes_of

_WHOLE = r"-?[0-9]{1,30}"
_NUMBER = r"[0-9]{0,30}(\.[0-9]{0,30})?"


def parse_size(text: str, *, option: str, what: str = "size") -> int:
    """Parse a size or a rate in bytes with an optional suffix B, K, M, G or T (powers of 1024), as systemd does.

    Raises UsageError.
    """
    size = bytes_of(text)
    if size is not None:
        return size
    raise UsageError(f"{option}{text} is not a {what}", hint=SIZE_HINT)


def is_whole(text: str) -> bool:
    """Return whether a text is a whole number without a sign."""
    return re.fullmatch(_WHOLE, text) is not None and text[0] != "-"


def whole_number(text: str) -> int:
    """Parse a whole number, for argparse."""
    if not re.fullmatch(_WHOLE, text):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number")
    return int(text)


def position(text: str) -> int:
    """Parse a whole number that is not negative, for argparse."""
    if not is_whole(text):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0")
    return int(text)


def number(text: str, least: float, most: float, what: str) -> float:
    """Parse a number in these bounds, for argparse. The error for another text is `… is not {what}`."""
    if re.fullmatch(_NUMBER, text) and text not in ("", ".") and least <= (value := float(text)) <= most:
        return value
    raise argparse.ArgumentTypeError(f"{text} is not {what}")


def seconds(text: str) -> float:
    """Parse a time span, for argparse."""
    return number(text, 0, 1e6, "a number of seconds")


#: systemd's spellings of a boolean; case is ignored.
_BOOLEANS = {
    **dict.fromkeys(("1", "yes", "y", "true", "t", "on"), "yes"),
    **dict.fromkeys(("0", "no", "n", "false", "f", "off"), "no"),
}


def boolean(option: str, text: str, *, auto: bool = False) -> str:
    """Return `yes` or `no` for a boolean in systemd's spelling, or `auto` if that is allowed. Raises UsageError."""
    if auto and text in ("auto", ""):
        return "auto"
    try:
        return _BOOLEANS[text.lower()]
    except KeyError:
        choices = "yes, no or auto" if auto else "yes or no"
        raise UsageError(f"{option}{text} is neither yes nor no", hint=f"write {option}{choices}") from None

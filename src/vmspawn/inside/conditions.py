# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the conditions that a client can wait for, and parses them."""

from __future__ import annotations

import re
import warnings
from typing import NamedTuple

from ..errors import UsageError

#: The conditions by name, each with a placeholder for its value, or an empty string if it has no value.
KINDS = {
    "agent": "",
    "booted": "",
    "console": "REGEX",
    "disk": "NAME",
    "off": "",
    "port": "N",
    "ssh": "",
}

#: Conditions that the client checks instead of the machine's manager: a client's regular expression may take long, and
#: a manager that ends cannot report its end.
OF_CLIENT = ("console", "off")

_PORT_MAX = 65535


class Condition(NamedTuple):
    """A condition, and its value."""

    kind: str
    value: str = ""

    def __str__(self) -> str:
        return f"{self.kind}={self.value}" if KINDS[self.kind] else self.kind


class Missing(NamedTuple):
    """A condition that does not hold, and the reason if it is known."""

    condition: str
    why: str

    def __str__(self) -> str:
        return f"{self.condition} ({self.why})" if self.why else self.condition


def parse(text: str) -> Condition:
    """Parse `booted` or `port=80`. Raises UsageError."""
    kind, equals, value = text.partition("=")
    if kind not in KINDS:
        known = ", ".join(f"{name}={value}" if value else name for name, value in KINDS.items())
        raise UsageError(f"there is no condition {text}", hint=f"the conditions are: {known}")
    if bool(KINDS[kind]) != bool(value) or (equals and not KINDS[kind]):
        right = f"{kind}={KINDS[kind]}" if KINDS[kind] else kind
        raise UsageError(f"{text} is not a condition", hint=f"write {right}")
    if kind == "port" and not (re.fullmatch("[0-9]{1,5}", value) and 1 <= int(value) <= _PORT_MAX):
        raise UsageError(f"{value} is not a port", hint="use 1 to 65535")
    if kind == "console":
        _check_pattern(value)
    return Condition(kind, value)


def _check_pattern(value: str) -> None:
    try:
        # Python warns of characters that a later version may read in another way.
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            re.compile(value, re.DOTALL)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"{value} is not a regular expression: {error}", hint="see: pydoc re") from None

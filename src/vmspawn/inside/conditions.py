# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the conditions of a machine that can be waited for, and parses them."""

from __future__ import annotations

import re
from typing import NamedTuple

from ..errors import UsageError

#: The conditions by their names, with what a value stands for, or nothing for one without.
KINDS = {
    "agent": "",
    "booted": "",
    "console": "REGEX",
    "disk": "NAME",
    "off": "",
    "port": "N",
    "ssh": "",
}

#: Conditions that the manager of a machine does not look at: a regular expression can take as long as it likes, and
#: nobody is there to report the end.
OF_CLIENT = ("console", "off")

_PORT_MAX = 65535


class Condition(NamedTuple):
    """A condition, and its value."""

    kind: str
    value: str = ""

    def __str__(self) -> str:
        return f"{self.kind}={self.value}" if KINDS[self.kind] else self.kind


class Missing(NamedTuple):
    """A condition that does not hold, and why, as far as it is known."""

    condition: str
    why: str

    def __str__(self) -> str:
        return f"{self.condition} ({self.why})" if self.why else self.condition


def parse(text: str) -> Condition:
    """Parse `booted` or `port=80`. Raises UsageError."""
    kind, equals, value = text.partition("=")
    if kind not in KINDS:
        known = ", ".join(f"{name}={value}" if value else name for name, value in KINDS.items())
        raise UsageError(f"there is no condition {text}", hint=f"there are: {known}")
    if bool(KINDS[kind]) != bool(value) or (equals and not KINDS[kind]):
        right = f"{kind}={KINDS[kind]}" if KINDS[kind] else kind
        raise UsageError(f"the condition {text} is not understood", hint=f"write {right}")
    if kind == "port" and not (re.fullmatch("[0-9]{1,5}", value) and 1 <= int(value) <= _PORT_MAX):
        raise UsageError(f"{value} is not a port", hint="use 1 to 65535")
    if kind == "console":
        _check_pattern(value)
    return Condition(kind, value)


def _check_pattern(value: str) -> None:
    try:
        re.compile(value)
    except re.error as error:
        raise UsageError(f"{value} is not a regular expression: {error}", hint="see: pydoc re") from None

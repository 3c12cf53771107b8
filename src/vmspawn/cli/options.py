# SPDX-License-Identifier: LGPL-2.1-or-later
"""What both commands share: how usage errors and other errors are said."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from ..errors import UsageError, VmspawnError

EXIT_FAILURE = 1
EXIT_USAGE = 2


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a mistake in one line, and with a hint where it has one."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and exit with 2."""
        complain(self.prog, UsageError(message, hint=f"see: {self.prog} --help"))
        sys.exit(EXIT_USAGE)


def complain(program: str, error: VmspawnError) -> None:
    """Print an error as `program: what failed: why`, and what to do about it below."""
    print(f"{program}: {error}", file=sys.stderr)
    if error.hint:
        print(f"{' ' * len(program)}  {error.hint}", file=sys.stderr)


#: What systemd takes for a boolean, in any case.
_BOOLEANS = {
    **dict.fromkeys(("1", "yes", "y", "true", "t", "on"), "yes"),
    **dict.fromkeys(("0", "no", "n", "false", "f", "off"), "no"),
}


def boolean(option: str, text: str, *, auto: bool = False) -> str:
    """`yes` or `no` for what systemd takes for a boolean, and `auto` if that is allowed. Raises UsageError."""
    if auto and text in ("auto", ""):
        return "auto"
    try:
        return _BOOLEANS[text.lower()]
    except KeyError:
        choices = "yes, no or auto" if auto else "yes or no"
        raise UsageError(f"{option}{text} is neither yes nor no", hint=f"write {option}{choices}") from None

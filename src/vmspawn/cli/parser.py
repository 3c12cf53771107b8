# SPDX-License-Identifier: LGPL-2.1-or-later
"""What both commands share: their parsers, and how usage errors are said."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from ..errors import UsageError
from .entrypoint import EXIT_USAGE, complain

#: Columns of help; more are hard to read.
_WIDTH_MAX = 110

#: Where the terminal does not say, or there is none.
_COLUMNS_DEFAULT = 80

_STDOUT = 1

#: How argparse says that there is no such option, and no such verb.
_UNKNOWN_OPTION = "unrecognized arguments: "
_UNKNOWN_VERB = "argument VERB: invalid choice: "


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a mistake in one line, and with a hint where it has one."""

    #: The verb that it parses the arguments of, if it is a verb's.
    verb = ""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse has it, which takes the value of `--option=--` for none at all and makes it a list."""
        given = sys.argv[1:] if args is None else list(args)
        options = given[: given.index("--")] if "--" in given else given
        for each in options:
            if each.startswith("-") and each.endswith("=--"):
                self.error(f"argument {each.removesuffix('=--')}: -- is no value")
        return super().parse_known_args(given, namespace)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and exit with 2."""
        name, known = "", set[str]()
        if message.startswith(_UNKNOWN_OPTION):
            name = message.removeprefix(_UNKNOWN_OPTION).split()[0].partition("=")[0]
            known = set(_options(self))
        elif message.startswith(_UNKNOWN_VERB):
            # What follows are all verbs, which --help has with what they do.
            name = message.removeprefix(_UNKNOWN_VERB).partition(" (")[0].strip("'")
            known = set(_verbs(self))
            message = f"there is no verb {name}"
        near = _nearest(name, known)
        help_command = " ".join(filter(None, (self.prog, self.verb, "--help")))
        complain(self.prog, UsageError(message, hint=f"did you mean {near}?" if near else f"see: {help_command}"))
        sys.exit(EXIT_USAGE)


#: How much of a mistyped name must be right for a hint, from 0 to 1.
_NEAR = 0.75


def _nearest(name: str, known: set[str]) -> str:
    """The one of the known names that begins so, or is written nearly so, if there is one."""
    if len(longer := [each for each in known if name and each.startswith(name)]) == 1:
        return longer[0]
    import difflib

    return next(iter(difflib.get_close_matches(name, known, 1, _NEAR)), "")


def _verbs(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The options of a parser, and those of its verbs."""
    for action in parser._actions:
        if action.help != argparse.SUPPRESS:
            yield from action.option_strings
    for verb in _verbs(parser).values():
        yield from _options(verb)


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help with options as systemd's tools write them, and no wider than the terminal."""

    def __init__(self, prog: str, **settings: Any) -> None:
        """As argparse wants it."""
        width = min(_WIDTH_MAX, _columns() - 2)
        super().__init__(prog, max_help_position=max(24, width // 3), width=width, **settings)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return option_names(action) if action.option_strings else super()._format_action_invocation(action)


def _columns() -> int:
    """The width of the terminal; argparse would import more than all of this for it, for each option anew."""
    if (text := os.environ.get("COLUMNS", "")).isdecimal() and int(text):
        return int(text)
    try:
        return os.get_terminal_size(_STDOUT).columns or _COLUMNS_DEFAULT
    except OSError:
        return _COLUMNS_DEFAULT


def option_names(action: argparse.Action) -> str:
    """An option's names, the long ones with what stands for the value: `-i, --image=PATH`."""
    value = _metavar(action)
    return ", ".join(f"{name}={value}" if value and name.startswith("--") else name for name in action.option_strings)


def _metavar(action: argparse.Action) -> str:
    """What stands for an option's value, or an empty string if it takes none."""
    if action.nargs == 0:
        return ""
    if isinstance(action.metavar, str):
        return action.metavar
    if action.choices:
        return "|".join(map(str, action.choices))
    return action.dest.upper()


def number(text: str, least: float, most: float, what: str) -> float:
    """A number in these bounds, for argparse, which tells its user that another text is not `what`."""
    with contextlib.suppress(ValueError):
        if least <= (value := float(text)) <= most:
            return value
    raise argparse.ArgumentTypeError(f"{text} is not {what}")


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

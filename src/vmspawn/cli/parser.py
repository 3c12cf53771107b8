# SPDX-License-Identifier: LGPL-2.1-or-later
"""Parses the arguments of both commands.

This parser sorts the arguments before argparse parses them. It replaces three rules of argparse that surprise users:

1. Options may stand before, between and after positional arguments. `--` ends them, and for a verb that runs a command
   they end at the command.
2. A word that begins with a dash is an option, except `-` itself, and a value that contains a space. An unknown option
   is refused, even if it contains a space.
3. No option can be abbreviated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from ..errors import UsageError
from .entrypoint import EXIT_USAGE, complain
from .tables import terminal_width

#: The maximum width of help; longer lines are hard to read.
_WIDTH_MAX = 110

#: Marks a positional argument, so that argparse does not take it for an option or the end of options.
_PLAIN = "\0"

#: argparse's messages for a surplus argument and an unknown verb.
_SURPLUS = "unrecognized arguments: "
_UNKNOWN_VERB = "argument VERB: invalid choice: "


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a mistake in one line and a hint."""

    #: The verb whose arguments this parser parses, or an empty string.
    verb = ""

    #: The parser of the whole command, if this parser is a verb's.
    command: Parser | None = None

    #: The number of positional arguments after which no word is an option, or None if only `--` ends the options.
    options_end_after: int | None = None

    #: The exit status for a mistake.
    exit_usage = EXIT_USAGE

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": Formatter, **settings})
        self._positionals.title = "Arguments"
        if "-h" in self._option_string_actions:
            self._option_string_actions["-h"].help = "show this help"
        #: Groups of options that the help omits.
        self.hidden_groups: list[object] = []
        #: The names of the verbs below each heading of the help.
        self.headings: dict[str, list[str]] = {}

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """Add an argument, as argparse does. Messages do not list an argument with nargs="*" as required."""
        if settings.get("nargs") == "*" and names and not names[0].startswith("-"):
            settings.setdefault("default", [])
        return super().add_argument(*names, **settings)

    def describe(self, option: str, text: str) -> None:
        """Replace the help of an option that several verbs share."""
        self._option_string_actions[option].help = text

    def end_options_here(self) -> None:
        """End the options after the positional arguments that were added so far.

        Verbs that run a command in the guest call this after they have added the command.
        """
        self.options_end_after = sum(not action.option_strings for action in self._actions)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Sort the arguments, then let argparse parse them. Unknown and surplus arguments are errors."""
        given = sys.argv[1:] if args is None else list(args)
        found, surplus = super().parse_known_args(self._sort(given), namespace)
        if surplus:
            self.error(_SURPLUS + " ".join(each.removeprefix(_PLAIN) for each in surplus))
        return found, []

    def _sort(self, given: Sequence[str]) -> list[str]:
        """Put the options in front of the positional arguments."""
        options: list[str] = []
        positionals: list[str] = []
        rest = list(reversed(given))
        while rest:
            word = rest.pop()
            if len(positionals) == self.options_end_after:
                positionals += [word, *reversed(rest)]
                break
            if word == "--":
                positionals += reversed(rest)
                break
            if _is_option(word):
                options += self._long(word, rest) if word.startswith("--") else self._short(word, rest)
            else:
                positionals.append(word)
        if _verbs(self):
            # The verb's parser sorts the words after the verb.
            return [*options, *positionals]
        return [*options, *map(_PLAIN.__add__, positionals)]

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        return super()._get_value(action, arg_string.removeprefix(_PLAIN))

    def _long(self, word: str, rest: list[str]) -> list[str]:
        """Return a long option for argparse, joined with its value if that is the next word."""
        name, equals, value = word.partition("=")
        if equals and value == "--":
            # argparse would drop this value.
            self.error(f"argument {name}: -- is not a value")
        takes_value = self._takes_value(name)
        if equals and not takes_value:
            self.error(f"{name} takes no value")
        if not equals and self._option_string_actions[name].nargs == "?":
            # An optional value stands behind an equals sign. argparse would take the next word for the value.
            return [f"{name}="]
        return [word] if equals or not takes_value else [f"{name}={self._value(name, rest)}"]

    def _short(self, word: str, rest: list[str]) -> list[str]:
        """Return a word of short options for argparse, and the last option's value if that is the next word."""
        for position, letter in enumerate(word[1:], 2):
            if self._takes_value(f"-{letter}"):
                is_last = position == len(word)
                return [word, self._value(f"-{letter}", rest)] if is_last else [word]
        return [word]

    def _value(self, name: str, rest: list[str]) -> str:
        """Remove an option's value from the remaining words and return it. Exits if the next word cannot be a value."""
        if not _has_value(rest):
            # argparse would take the first positional argument, because `_sort` puts the options first.
            self.error(str(argparse.ArgumentError(self._option_string_actions[name], "expected one argument")))
        return rest.pop()

    def _takes_value(self, name: str) -> bool:
        """Return whether an option takes a value. Exits for an unknown option."""
        action = self._option_string_actions.get(name)
        if action is None:
            self._refuse(f"unknown option {name}", self._advice(name))
        return action.nargs != 0

    def _advice(self, name: str) -> str:
        """Return the hint for an unknown option."""
        if verbs := [verb for verb, parser in _verbs(self.command or self).items() if name in _options(parser)]:
            return f"it is an option of: {', '.join(verbs)}"
        return self._near(name, _options(self))

    def error(self, message: str) -> NoReturn:
        """Report a mistake, and exit with the status `exit_usage`."""
        hint = self._near("", ())
        if message.startswith(_SURPLUS):
            message = "unexpected argument: " + message.removeprefix(_SURPLUS)
        elif message.startswith(_UNKNOWN_VERB):
            # Replace argparse's list of all verbs by a hint.
            name = message.removeprefix(_UNKNOWN_VERB).partition(" (")[0].strip("'")
            message, hint = f"there is no verb {name}", self._near(name, _verbs(self))
        self._refuse(message, hint)

    def _near(self, name: str, known: Sequence[str] | dict[str, Any]) -> str:
        """Return the hint for a mistyped name: the most similar known name, or the command that lists the names."""
        if near := _nearest(name, list(known)):
            return f"did you mean {near}?"
        return f"see: {' '.join(filter(None, (self.prog, self.verb, '--help')))}"

    def _refuse(self, message: str, hint: str) -> NoReturn:
        complain(self.prog, UsageError(message, hint=hint))
        sys.exit(self.exit_usage)

    def format_help(self) -> str:
        """Return the help, with verbs below their headings and without hidden groups."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        for title, actions in self._sections():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def _sections(self) -> Iterator[tuple[str, list[argparse.Action]]]:
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                verbs = {each.dest: each for each in action._get_subactions()}
                yield from ((title, [verbs[name] for name in names]) for title, names in self.headings.items())
        for group in self._action_groups:
            is_of_verbs = any(isinstance(each, argparse._SubParsersAction) for each in group._group_actions)
            if group not in self.hidden_groups and not is_of_verbs:
                yield (group.title or "")[:1].upper() + (group.title or "")[1:], group._group_actions


def _is_option(word: str) -> bool:
    return word.startswith("-") and word != "-"


def _has_value(rest: list[str]) -> bool:
    """Return whether the next word can be the value of an option: it has no leading dash, or contains a space."""
    return bool(rest) and (not _is_option(rest[-1]) or " " in rest[-1])


#: The minimum similarity of a suggested name, from 0 to 1.
_NEAR = 0.75


def _nearest(name: str, known: list[str]) -> str:
    """Return the known name that begins with `name`, or the most similar one, or an empty string."""
    if len(longer := [each for each in known if name and each.startswith(name)]) == 1:
        return longer[0]
    import difflib

    return next(iter(difflib.get_close_matches(name, known, 1, _NEAR)), "")


def _verbs(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _options(parser: argparse.ArgumentParser) -> list[str]:
    """Return the options of a parser that its help lists."""
    return [name for each in parser._actions if each.help != argparse.SUPPRESS for name in each.option_strings]


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Formats help to fit the terminal, with options spelled as in systemd's tools."""

    def __init__(self, prog: str, **settings: Any) -> None:
        """Make a formatter, as argparse does."""
        width = min(_WIDTH_MAX, terminal_width() - 2)
        super().__init__(prog, max_help_position=max(24, width // 3), width=width, **settings)

    def _split_lines(self, text: str, width: int) -> list[str]:
        # Options and values, such as --snapshot-dir=, stay in one piece.
        from textwrap import wrap

        return wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return option_names(action) if action.option_strings else super()._format_action_invocation(action)


def option_names(action: argparse.Action) -> str:
    """Return an option's names, and a placeholder for the value after a long name: `-i, --image=PATH`."""
    value = _metavar(action)
    value = f"[={value}]" if action.nargs == "?" else f"={value}" if value else ""
    return ", ".join(f"{name}{value}" if name.startswith("--") else name for name in action.option_strings)


def _metavar(action: argparse.Action) -> str:
    """Return the placeholder for an option's value, or an empty string if it takes none."""
    if action.nargs == 0:
        return ""
    if isinstance(action.metavar, str):
        return action.metavar
    if action.choices:
        return "|".join(map(str, action.choices))
    return action.dest.upper()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Adds verbs to vmctl's parser, each with the options that all verbs share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ...text import printable
from ..parser import Parser
from ..tables import JSON_MODES
from ..values import seconds

PROGRAM = "vmctl"
_OPTIONS = "[OPTION…]"

#: A function that performs a verb. Raises VmspawnError if it fails.
Action = Callable[[argparse.Namespace], None]


class Verbs:
    """The verbs of a parser, below the headings of its help."""

    def __init__(self, parser: Parser) -> None:
        """Prepare a parser for verbs."""
        self._command = parser
        self._subparsers = parser.add_subparsers(title="verbs", metavar="VERB", dest="verb", required=True)
        self._heading: list[str] = []

    def heading(self, title: str) -> None:
        """Begin a new heading."""
        self._heading = self._command.headings.setdefault(title, [])

    def add(self, name: str, action: Action, text: str, arguments: str = "") -> Parser:
        """Add a verb. `arguments` is the usage after its name; `[OPTION…]` is appended unless it contains that."""
        self._heading.append(name)
        parser: Parser = self._subparsers.add_parser(name, help=text, description=f"{text[:1].upper()}{text[1:]}.")
        parser.prog, parser.verb, parser.command = PROGRAM, name, self._command
        options = "" if _OPTIONS in arguments else _OPTIONS
        parser.usage = " ".join(filter(None, (PROGRAM, name, arguments, options)))
        add_common_options(parser, default=argparse.SUPPRESS)
        parser.set_defaults(action=action)
        return parser

    def add_for_machine(self, name: str, action: Action, text: str, arguments: str = "") -> Parser:
        """Add a verb whose first argument is a machine."""
        parser = self.add(name, action, text, f"MACHINE {arguments}".rstrip())
        parser.add_argument("machine", metavar="MACHINE", help="name of the machine; see: vmctl list")
        return parser

    def add_hidden(self, name: str, action: Action) -> Parser:
        """Add a verb for programs, which the help does not list."""
        parser: Parser = self._subparsers.add_parser(name, add_help=False)
        parser.set_defaults(action=action)
        return parser


def add_common_options(parser: argparse.ArgumentParser, **default: Any) -> None:
    """Add the options that may stand before and after the verb.

    After the verb, `default` is argparse.SUPPRESS, so that a value from before the verb is kept.
    """
    no_json: dict[str, Any] = default or {"default": "off"}
    parser.add_argument(
        "-j", dest="json", action="store_const", const="pretty", help="same as --json=pretty", **no_json
    )
    parser.add_argument("--json", choices=JSON_MODES, help="print JSON", **no_json)
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors", **default)
    parser.add_argument("--timeout", metavar="SECONDS", type=seconds, help="time to wait for an answer", **default)


def add_disk(parser: argparse.ArgumentParser) -> None:
    """Add the argument that names a disk."""
    parser.add_argument("disk", metavar="DISK", type=disk_name, help="name of the disk; see: vmctl list-disks")


def disk_name(text: str) -> str:
    """Escape control characters as disks' default names do, so that a file's name finds its disk, escaped or not."""
    return printable(text)

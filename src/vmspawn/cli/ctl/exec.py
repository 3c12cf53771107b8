# SPDX-License-Identifier: LGPL-2.1-or-later
"""Implements the verbs that run commands in the guest."""

from __future__ import annotations

import argparse
import os
import sys

from ...errors import UsageError, VmspawnError
from ...timeouts import COMMAND_START_TIMEOUT
from ..entrypoint import EXIT_OWN_FAILURE, complain
from ..parser import Parser
from ..values import seconds
from .verbs import PROGRAM, Verbs


def add(verbs: Verbs) -> None:
    """Add the verbs."""
    execute = verbs.add_for_machine("exec", _exec, "run a command in the guest", "[OPTION…] [--] COMMAND [ARGUMENT…]")
    execute.add_argument("command", metavar="COMMAND", help="program in the guest, found through the command's PATH")
    execute.end_options_here()
    execute.add_argument("arguments", metavar="ARGUMENT", nargs="*", help="argument, passed unchanged")
    execute.add_argument("-n", "--no-stdin", action="store_true", help="run the command without standard input")
    execute.add_argument("-t", "--tty", action="store_true", help="run the command on a terminal")
    execute.add_argument("-u", "--uid", metavar="USER", help="run the command as this user of the guest")
    # The name that begins error messages: vmspawn's option --run= runs this verb.
    execute.add_argument("--program", default=PROGRAM, help=argparse.SUPPRESS)
    _add_options(execute)
    shell = verbs.add("shell", _shell, "open a shell, or run a command, on a terminal in the guest",
                      "[USER@]MACHINE [OPTION…] [COMMAND [ARGUMENT…]]")  # fmt: skip
    shell.add_argument("machine", metavar="[USER@]MACHINE", help="name of the machine; see: vmctl list")
    shell.add_argument("arguments", metavar="COMMAND", nargs="*", help="program and its arguments (default: the shell)")
    shell.end_options_here()
    shell.set_defaults(program=PROGRAM)
    _add_options(shell)


def _add_options(parser: Parser) -> None:
    parser.exit_usage = EXIT_OWN_FAILURE
    parser.add_argument("-C", "--chdir", metavar="DIR", help="run the command in this directory of the guest")
    parser.add_argument(
        "-E", "-e", "--setenv", metavar="NAME[=VALUE]", action="append", default=[], help="set an environment variable"
    )
    parser.add_argument(
        "--time-limit", metavar="SECONDS", type=seconds, help="end the command after this time, with exit status 124"
    )


def _exec(options: argparse.Namespace) -> None:
    stdin = not options.no_stdin
    _run(options, [options.command, *options.arguments], options.uid, terminal=options.tty, stdin=stdin)


def _shell(options: argparse.Namespace) -> None:
    user, at, options.machine = options.machine.rpartition("@")
    _run(options, options.arguments, user if at else None, terminal=os.isatty(0), stdin=True)


def _run(options: argparse.Namespace, arguments: list[str], user: str | None, *, terminal: bool, stdin: bool) -> None:
    """Run the command, and exit with its status."""
    # No other verb needs this module.
    from . import guest_command

    try:
        wish = guest_command.Wish(
            program=options.program,
            machine=options.machine,
            arguments=arguments,
            environment=_environment(options.setenv, terminal=terminal),
            directory=options.chdir,
            user=user,
            stdin=stdin,
            terminal=terminal,
            timeout=COMMAND_START_TIMEOUT if options.timeout is None else options.timeout,
            time_limit=options.time_limit,
        )
        status = guest_command.run(wish)
    except VmspawnError as error:
        complain(options.program, error)
        status = EXIT_OWN_FAILURE
    sys.exit(status)


def _environment(settings: list[str], *, terminal: bool) -> dict[str, str]:
    """Return the variables of --setenv= and, on a terminal, vmctl's TERM. Raises UsageError.

    A variable without a value is copied from vmctl's environment.
    """
    found = {"TERM": os.environ["TERM"]} if terminal and os.environ.get("TERM") else {}
    for each in settings:
        name, equals, value = each.partition("=")
        if not name:
            raise UsageError(f"--setenv={each}: the name is empty", hint="write NAME=VALUE")
        if equals:
            found[name] = value
        elif name in os.environ:
            found[name] = os.environ[name]
    return found

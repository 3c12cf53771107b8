# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connects to a machine and prints its replies, for all verbs of vmctl."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ...control.client import REPLY_TIMEOUT, Client
from ...errors import UsageError, VmspawnError
from ...text import printable
from ...timeouts import REPLY_GRACE
from ..tables import print_json, print_table

INSTANCE = "io.systemd.MachineInstance"
MACHINE = "io.vmspawn.Machine"


def reply_timeout(options: argparse.Namespace, usual: float = REPLY_TIMEOUT) -> float:
    """Return the time to wait for an answer: `--timeout=`, or `usual`. Raises UsageError for 0."""
    if options.timeout is None:
        return usual
    if not options.timeout:
        raise UsageError(f"--timeout=0 leaves {options.verb} no time", hint="write a time in seconds, or leave it out")
    return float(options.timeout)


def client_for(options: argparse.Namespace) -> Client:
    """Connect to the machine that the options name. Raises UsageError for `--timeout=0`."""
    return Client(options.machine, timeout=reply_timeout(options))


def client_waiting_for_guest(options: argparse.Namespace, usual: float) -> Client:
    """Connect to the machine for a method that waits for the guest.

    `--timeout=` is the time for the guest, `usual` seconds by default. The manager reports when that time has
    passed. If the report does not come soon after, the client reports that the manager did not answer.
    """
    if options.timeout is None:
        return Client(options.machine, timeout=REPLY_TIMEOUT + usual)
    return Client(options.machine, timeout=options.timeout + REPLY_GRACE)


class failing_to:
    """Puts `cannot VERB SUBJECT` in front of an error."""

    def __init__(self, verb: str, subject: str) -> None:
        self._failure = f"cannot {verb} {subject}: "
        # An error about opening the subject names the path already.
        self._repeated = f"cannot open {subject}: "

    def __enter__(self) -> None:
        pass

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, VmspawnError):
            error.prefix(self._failure, instead_of=self._repeated)


def show(
    options: argparse.Namespace,
    found: list[dict[str, Any]],
    what: str,
    columns: Sequence[str],
    row: Callable[[dict[str, Any]], Sequence[str]],
    *,
    right: Sequence[str],
    fit: bool = False,
) -> None:
    """Print a list as JSON or as a table. For an empty table, print `No {what}.`"""
    if options.json != "off":
        print_json(found, options.json)
    elif found:
        print_table(columns, [row(each) for each in found], right=right, fit=fit)
    else:
        say(options, f"No {what}.")


def say(options: argparse.Namespace, text: str) -> None:
    """Print a line, unless the output is JSON or `quiet` is set."""
    if not options.quiet and options.json == "off":
        print(printable(text))


def report(options: argparse.Namespace, line: str) -> None:
    """Print a line on standard error, unless `quiet` is set."""
    if not options.quiet:
        print(f"vmctl: {printable(line)}", file=sys.stderr, flush=True)


def answer(options: argparse.Namespace, reply: dict[str, Any], text: str) -> None:
    """Print a reply as JSON, or as a line of text."""
    if options.json != "off":
        print_json(reply, options.json)
    say(options, text)

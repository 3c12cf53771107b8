# SPDX-License-Identifier: LGPL-2.1-or-later
"""Implements the verbs that copy files to and from the guest."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from ...errors import UsageError
from ...text import printable
from ...timeouts import COMMAND_START_TIMEOUT
from ..entrypoint import exit_on_signals
from ..parser import Parser
from .verbs import Verbs

_SKIP = "leave out devices, sockets, named pipes, and links of the guest that lead out of the source"


def add(verbs: Verbs) -> None:
    """Add the verbs."""
    copy = verbs.add("copy", _copy, "copy files to or from the guest", "SOURCE… TARGET")
    copy.add_argument("sources", metavar="SOURCE", nargs="+", help="file or directory; MACHINE:PATH in the guest")
    copy.add_argument("target", metavar="TARGET", help="path on the other side; MACHINE:PATH in the guest")
    _add_options(copy)
    for name, direction, text, arguments in (
        ("copy-to", "to", "copy a file or directory to the guest", "SOURCE [TARGET]"),
        ("copy-from", "from", "copy a file or directory from the guest", "SOURCE [TARGET]"),
    ):
        verb = verbs.add_for_machine(name, _copy_one, text, arguments)
        verb.add_argument("source", metavar="SOURCE", help="file or directory")
        verb.add_argument("target", metavar="TARGET", nargs="?", help="path on the other side (default: the same)")
        verb.set_defaults(direction=direction)
        _add_options(verb)


def _add_options(parser: Parser) -> None:
    parser.describe("--timeout", f"time to wait for the guest's agent (default: {COMMAND_START_TIMEOUT:g})")
    parser.add_argument("--skip-special", action="store_true", help=_SKIP)


def _copy(options: argparse.Namespace) -> None:
    sources, target = list(map(_split, options.sources)), _split(options.target)
    machines = {machine for machine, _ in sources}
    if len(machines) != 1 or (target[0] is None) == (machines == {None}):
        raise UsageError(
            "one side has to be in a guest, and the other on this host",
            hint="write MACHINE:PATH for one side, and ./FILE for a name with a colon",
        )
    to_guest = target[0] is not None
    machine = target[0] or machines.pop()
    _perform(options, machine or "", [path for _, path in sources], target[1], to_guest=to_guest)


def _split(text: str) -> tuple[str | None, str]:
    """Split MACHINE:PATH. A path of the host has no colon before its first slash."""
    machine, colon, path = text.partition(":")
    if not colon or "/" in machine:
        return None, text
    return machine, path


def _copy_one(options: argparse.Namespace) -> None:
    target = options.source if options.target is None else options.target
    _perform(options, options.machine, [options.source], target, to_guest=options.direction == "to")


def _perform(options: argparse.Namespace, machine: str, sources: list[str], target: str, *, to_guest: bool) -> None:
    # No other verb needs these modules.
    from ...inside.copying import Copying
    from .guest_process import GuestProcess
    from .progress_bar import ProgressBar

    timeout = COMMAND_START_TIMEOUT if options.timeout is None else options.timeout

    def start(arguments: Sequence[bytes], has_input: bool) -> GuestProcess:
        return GuestProcess(machine, arguments, stdin=has_input, timeout=timeout)

    # The copy then removes its temporary directories.
    exit_on_signals()
    with ProgressBar(is_wanted=not options.quiet) as bar:
        copying = Copying(start, skip_special=options.skip_special, on_progress=bar.show if bar.is_shown else None)
        copy: Callable[[Sequence[str], str], None] = copying.to_guest if to_guest else copying.from_guest
        copy(sources, target)
    if not options.quiet:
        for line in copying.skipped:
            print(f"vmctl: left out: {printable(line)}", file=sys.stderr)

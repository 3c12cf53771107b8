# SPDX-License-Identifier: LGPL-2.1-or-later
"""Implements the command `vmctl`, which controls running machines.

Verbs make blocking calls on a machine's control socket. Importing asyncio would slow every verb down.
"""

from __future__ import annotations

import argparse
from typing import NoReturn

from ...version import VERSION
from ..entrypoint import run
from ..parser import Parser
from . import (
    adopt,
    agent,
    console,
    copy,
    disk_list,
    disks,
    events,
    exec,
    forwards,
    install_extras,
    machines,
    media,
    names,
    qmp,
    snapshots,
    ssh,
    volumes,
    wait_for,
)
from .verbs import PROGRAM, Verbs, add_common_options


def build_parser() -> Parser:
    """Return a parser of all verbs and options."""
    parser = Parser(
        prog=PROGRAM,
        usage="vmctl [OPTION…] VERB [MACHINE] …",
        description="Control virtual machines that vmspawn runs.",
    )
    parser.add_argument("--version", action="version", version=f"vmctl {VERSION}", help="show the version")
    add_common_options(parser)
    verbs = Verbs(parser)
    parser.end_options_here()
    for title, groups in (
        ("Machines", (machines, adopt, events)),
        ("Guest", (exec, copy, wait_for, agent)),
        ("Network", (forwards, ssh)),
        ("Console", (console,)),
        ("Disks", (disk_list, disks, media, volumes)),
        ("Snapshots", (snapshots,)),
        ("QMP", (qmp,)),
        ("Installation", (install_extras, names)),
    ):
        verbs.heading(title)
        for group in groups:
            group.add(verbs)
    verbs.heading("Help")
    help_verb = verbs.add("help", _help, "show help for vmctl, or for a verb", "[VERB]")
    help_verb.add_argument("topic", metavar="VERB", nargs="?", help="verb to show help for")
    return parser


def _help(options: argparse.Namespace) -> None:
    parser = build_parser()
    if options.topic is None:
        parser.print_help()
    else:
        # The parser reports an unknown verb.
        parser.parse_args([options.topic, "--help"])


def _main() -> int:
    options = build_parser().parse_args()
    options.action(options)
    return 0


def main() -> NoReturn:
    """Run vmctl and exit."""
    run(PROGRAM, _main)


if __name__ == "__main__":
    main()

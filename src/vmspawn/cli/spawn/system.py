# SPDX-License-Identifier: LGPL-2.1-or-later
"""The options that place a machine in its host's system: registration with machined, and the unit it runs in."""

from __future__ import annotations

import argparse

from ...host.machined import Registration
from ..parser import boolean


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options to the command's parser."""
    group = parser.add_argument_group("The host's system")
    group.add_argument(
        "--register",
        metavar="BOOL|auto",
        default="auto",
        help="make the machine known to systemd-machined (default: auto, if it runs)",
    )
    group.add_argument("--system", dest="scope", action="store_const", const="system", help="use the system's machined")
    group.add_argument("--user", dest="scope", action="store_const", const="user", help="use the user's machined")
    group.add_argument("--keep-unit", action="store_true", help="let QEMU stay in the unit that vmspawn runs in")
    group.add_argument("-S", "--slice", metavar="SLICE", default="", help="run QEMU in a scope unit in this slice")
    group.add_argument(
        "--property",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a property of QEMU's scope unit; repeatable",
    )


def registration(options: argparse.Namespace) -> Registration:
    """What the options say. Raises UsageError."""
    mode = boolean("--register=", options.register, auto=True)
    return Registration(mode, options.scope or "", options.keep_unit, options.slice, tuple(options.property))

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the options for registration with systemd-machined, and for QEMU's unit."""

import argparse
from typing import TypedDict

from ...host.machined import Registration
from ..values import boolean


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options to the command's parser."""
    group = parser.add_argument_group("Host")
    group.add_argument(
        "--register",
        metavar="BOOL|auto",
        default="auto",
        help="register with systemd-machined (default: auto, if it runs)",
    )
    group.add_argument("--system", dest="scope", action="store_const", const="system", help="use the system's machined")
    group.add_argument("--user", dest="scope", action="store_const", const="user", help="use the user's machined")
    group.add_argument("--keep-unit", action="store_true", help="keep QEMU in the unit that vmspawn runs in")
    group.add_argument("-S", "--slice", metavar="SLICE", default="", help="run QEMU in a scope unit in this slice")
    group.add_argument(
        "--property",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="set a property of QEMU's scope unit; repeatable",
    )


class Host(TypedDict):
    """Fields of MachineConfig."""

    registration: Registration


def read(options: argparse.Namespace) -> Host:
    """Read the options. Raises UsageError."""
    mode = boolean("--register=", options.register, auto=True)
    properties = tuple(options.property)
    return {"registration": Registration(mode, options.scope or "", options.keep_unit, options.slice, properties)}

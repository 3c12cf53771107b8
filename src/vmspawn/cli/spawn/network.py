# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the options for the machine's network."""

import argparse
from typing import TypedDict

from ...network.forward import Forward, parse


class Network(TypedDict):
    """Fields of MachineConfig."""

    network_user: bool
    forwards: tuple[Forward, ...]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options to the command's parser."""
    group = parser.add_argument_group("Network")
    group.add_argument("--network-user-mode", action="store_true", help="add a network card behind QEMU's own NAT")
    group.add_argument(
        "--forward",
        metavar="[ADDRESS:]PORT:GUESTPORT[/udp]",
        action="append",
        default=[],
        help="forward a port of the host to the guest, and add that network card; repeatable",
    )


def read(options: argparse.Namespace) -> Network:
    """Read the options. Raises UsageError."""
    return {"network_user": options.network_user_mode, "forwards": tuple(map(parse, options.forward))}

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the options that configure the guest: credentials, SMBIOS strings."""

import argparse
from typing import TypedDict

from ...boot.credentials import Credential
from .. import credentials
from ..values import boolean


class Guest(TypedDict):
    """Fields of MachineConfig."""

    credentials: tuple[Credential, ...]
    vendor_strings: tuple[str, ...]
    agent: bool


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options to the command's parser."""
    group = parser.add_argument_group("Guest")
    group.add_argument(
        "--set-credential",
        metavar="ID:VALUE",
        action="append",
        default=[],
        help="pass a credential to the guest's systemd; repeatable",
    )
    group.add_argument(
        "--load-credential",
        metavar="ID:PATH",
        action="append",
        default=[],
        help="pass a credential from a file or a socket; repeatable",
    )
    group.add_argument(
        "-s",
        "--smbios11",
        metavar="STRING",
        action="append",
        default=[],
        help="pass an SMBIOS type 11 string; repeatable",
    )


def read(options: argparse.Namespace) -> Guest:
    """Read the options. Raises UsageError."""
    given = [*map(credentials.parse_set, options.set_credential)]
    return {
        "credentials": (*given, *map(credentials.parse_load, options.load_credential)),
        "vendor_strings": tuple(options.smbios11),
        "agent": options.agent is None or boolean("--agent=", options.agent) == "yes",
    }

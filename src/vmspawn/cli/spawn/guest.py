# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the options that configure the guest: credentials, SMBIOS strings, cloud-init, the SSH key."""

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
    cloud_init: str | None
    pass_ssh_key: bool | None
    ssh_key_type: str


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
    group.add_argument(
        "--cloud-init",
        metavar="FILE",
        nargs="?",
        help="attach a seed for the image's cloud-init: an SSH key, the host name, and user data from a file",
    )
    group.add_argument(
        "--pass-ssh-key", metavar="BOOL", help="make an SSH key for the machine, and pass it to the guest's root user"
    )
    group.add_argument(
        "--ssh-key-type", metavar="TYPE", default="ed25519", help="type of the SSH key, as in ssh-keygen(1)"
    )


def read(options: argparse.Namespace) -> Guest:
    """Read the options. Raises UsageError."""
    given = [*map(credentials.parse_set, options.set_credential)]
    return {
        "credentials": (*given, *map(credentials.parse_load, options.load_credential)),
        "vendor_strings": tuple(options.smbios11),
        "agent": options.agent is None or boolean("--agent=", options.agent) == "yes",
        "cloud_init": options.cloud_init,
        "pass_ssh_key": _is_yes("--pass-ssh-key=", options.pass_ssh_key),
        "ssh_key_type": options.ssh_key_type,
    }


def _is_yes(option: str, text: str | None) -> bool | None:
    return None if text is None else boolean(option, text) == "yes"

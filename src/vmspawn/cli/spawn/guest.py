# SPDX-License-Identifier: LGPL-2.1-or-later
"""The options for what the guest is given: credentials, SMBIOS strings, a network, memory."""

from __future__ import annotations

import argparse
from typing import Any

from ...boot import credentials
from ...boot.config import parse_size
from ...boot.memory import SLOTS_DEFAULT, Growth
from ...errors import UsageError


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options to the command's parser."""
    group = parser.add_argument_group("Into the guest")
    group.add_argument(
        "--set-credential",
        metavar="ID:VALUE",
        action="append",
        default=[],
        help="a credential for the guest's systemd; repeatable",
    )
    group.add_argument(
        "--load-credential",
        metavar="ID:PATH",
        action="append",
        default=[],
        help="a credential from a file or a socket; repeatable",
    )
    group.add_argument(
        "-s", "--smbios11", metavar="STRING", action="append", default=[], help="an SMBIOS type 11 string; repeatable"
    )
    group.add_argument("--network-user-mode", action="store_true", help="a network card behind QEMU's own NAT")


def fields(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of MachineConfig that the options fill. Raises UsageError."""
    loaded = [credentials.parse_load(each) for each in options.load_credential]
    return {
        "credentials": (*map(credentials.parse_set, options.set_credential), *loaded),
        "vendor_strings": tuple(options.smbios11),
        "network_user": options.network_user_mode,
        **_memory(options.ram),
    }


def _memory(text: str | None) -> dict[str, Any]:
    """Parse `--ram=SIZE[:MAX[:SLOTS]]`."""
    if text is None:
        return {}
    size, *rest = text.split(":")
    found: dict[str, Any] = {"ram": parse_size(size, option="--ram=")}
    if len(rest) > 2 or (len(rest) == 2 and not rest[1].isdigit()):
        raise UsageError(f"--ram={text} is not a size", hint="write --ram=SIZE[:MAX[:SLOTS]]")
    if rest:
        slots = int(rest[1]) if len(rest) == 2 else SLOTS_DEFAULT
        found["ram_growth"] = Growth(parse_size(rest[0], option="--ram="), slots)
    return found

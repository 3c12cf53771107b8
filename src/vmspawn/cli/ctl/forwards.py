# SPDX-License-Identifier: LGPL-2.1-or-later
"""Implements the verbs for ports of the host that are forwarded to the guest."""

from __future__ import annotations

import argparse
from typing import Any

from ...network.forward import Forward, parse, parse_host
from .replies import MACHINE, answer, client_for, show
from .verbs import Verbs


def add(verbs: Verbs) -> None:
    """Add the verbs."""
    forward = verbs.add_for_machine("forward", _forward, "forward ports of the host to the guest", "FORWARD…")
    forward.add_argument(
        "forwards",
        metavar="FORWARD",
        nargs="+",
        help="[ADDRESS:]PORT:GUESTPORT[/udp]; PORT 0 is any free port (default address: 127.0.0.1)",
    )
    forward.add_argument("--remove", action="store_true", help="remove the forwards; GUESTPORT may be left out")
    verbs.add_for_machine("list-forwards", _list, "list the ports that are forwarded to the guest")


def _forward(options: argparse.Namespace) -> None:
    method, parser = ("RemoveForward", parse_host) if options.remove else ("AddForward", parse)
    wanted = [parser(text) for text in options.forwards]
    with client_for(options) as client:
        for forward in wanted:
            reply = client.call(f"{MACHINE}.{method}", _parameters(forward))
            line = forward_text(reply["forward"])
            answer(options, reply["forward"], f"Removed {line}" if options.remove else line)


def _parameters(forward: Forward) -> dict[str, Any]:
    return {
        "address": forward.address,
        "port": forward.port,
        "guestPort": forward.guest_port or None,
        "protocol": forward.protocol,
    }


def forward_text(found: dict[str, Any]) -> str:
    """Describe a forward: `127.0.0.1:8080 to port 80`."""
    suffix = "" if found["protocol"] == "tcp" else f" ({found['protocol']})"
    return f"{found['address']}:{found['port']} to port {found['guestPort']}{suffix}"


def _list(options: argparse.Namespace) -> None:
    with client_for(options) as client:
        forwards = client.call(f"{MACHINE}.ListForwards")["forwards"]
    columns = ("PROTOCOL", "ADDRESS", "PORT", "GUESTPORT")
    show(options, forwards, "forwards", columns, _row, right=("PORT", "GUESTPORT"))


def _row(found: dict[str, Any]) -> tuple[str, ...]:
    return found["protocol"], found["address"], str(found["port"]), str(found["guestPort"])

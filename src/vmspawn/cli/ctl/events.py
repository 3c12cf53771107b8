# SPDX-License-Identifier: LGPL-2.1-or-later
"""Implements the verb `events`."""

from __future__ import annotations

import argparse
from typing import Any

from ...control.client import VarlinkError
from ...errors import NotConnected
from ...text import printable
from ..disconnect import watching
from ..tables import print_json
from .replies import INSTANCE, client_for
from .verbs import Verbs


def add(verbs: Verbs) -> None:
    """Add the verb."""
    events = verbs.add_for_machine("events", _events, "print a machine's events as they happen")
    events.add_argument("--filter", metavar="EVENT[,EVENT…]", default="", help="print only these events")


def _events(options: argparse.Namespace) -> None:
    wanted = [name for name in options.filter.split(",") if name]
    with client_for(options) as client, watching(options.machine, client.connection) as disconnect:
        try:
            for event in client.stream(f"{INSTANCE}.SubscribeEvents", {"filter": wanted}):
                _print_event(event, options.json)
        except VarlinkError as error:
            # The events end with the machine.
            if error.leaf != "NotConnected":
                raise
        except NotConnected:
            disconnect.check()


def _print_event(event: dict[str, Any], mode: str) -> None:
    if mode != "off":
        print_json(event, mode)
        return
    import time

    data = event.get("data") or {}
    words = " ".join(f"{key}={value}" for key, value in data.items())
    print(printable(f"{time.strftime('%H:%M:%S')} {event['event']} {words}".rstrip()), flush=True)

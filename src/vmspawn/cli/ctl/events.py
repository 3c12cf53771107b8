# SPDX-License-Identifier: LGPL-2.1-or-later
"""Implements the verb `events`."""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

from ...control.client import Client, VarlinkError
from ...errors import NotConnected, VmspawnError
from ...text import printable
from ..disconnect import watching
from ..tables import print_json
from .qmp_session import Session
from .replies import INSTANCE, MACHINE, client_for, report
from .verbs import Verbs

#: Seconds within which QEMU must list its events. Without the list, vmctl checks no names.
_SCHEMA_TIMEOUT = 10.0

#: The events that are vmspawn's, not QEMU's.
OWN_EVENTS = (
    "MachineEnded",
    "StorageAttached",
    "StorageChanged",
    "StorageDetached",
    "StorageDetaching",
    "StorageFailed",
)


def add(verbs: Verbs) -> None:
    """Add the verb."""
    events = verbs.add_for_machine("events", _events, "print a machine's events as they happen")
    events.add_argument(
        "--filter",
        metavar="EVENT[,EVENT…]",
        default="",
        help="print only these events; names that QEMU lacks get a warning",
    )


def _events(options: argparse.Namespace) -> None:
    wanted = [name for name in options.filter.split(",") if name]
    if unchecked := set(wanted).difference(OWN_EVENTS):
        _warn_about_unknown(options, unchecked)
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


def _warn_about_unknown(options: argparse.Namespace, names: set[str]) -> None:
    """Warn about names of events that QEMU does not have. No warning is possible while QEMU does not answer."""
    with contextlib.suppress(VmspawnError), Client(options.machine, timeout=_SCHEMA_TIMEOUT) as client:
        connected, received = client.upgrade(f"{MACHINE}.AcquireQMP", {"readOnly": True})
        schema = Session(connected, received, _SCHEMA_TIMEOUT).execute("query-qmp-schema", {})
        known = {*OWN_EVENTS, *(each["name"] for each in schema if each["meta-type"] == "event")}
        for name in sorted(names - known):
            report(options, f"QEMU has no event {printable(name)}{_suggestion(name, known)}")


def _suggestion(name: str, known: set[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name.upper(), known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def _print_event(event: dict[str, Any], mode: str) -> None:
    if mode != "off":
        print_json(event, mode)
        return
    import time

    data = event.get("data") or {}
    words = " ".join(f"{key}={value}" for key, value in data.items())
    print(printable(f"{time.strftime('%H:%M:%S')} {event['event']} {words}".rstrip()), flush=True)

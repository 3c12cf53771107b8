# SPDX-License-Identifier: LGPL-2.1-or-later
"""Implements the verb `list-disks`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

from ...control.client import Client
from ..tables import format_size
from .replies import MACHINE, client_for, show
from .verbs import Verbs

#: Seconds over which `list-disks --stats` measures rates.
_STATISTICS_SECONDS = 1.0


def add(verbs: Verbs) -> None:
    """Add the verb."""
    listing = verbs.add_for_machine("list-disks", _list, "list a machine's disks")
    listing.add_argument("-l", "--long", action="store_true", help="show all columns")
    listing.add_argument("--stats", action="store_true", help="show I/O totals, and rates over a second")


def _list(options: argparse.Namespace) -> None:
    with client_for(options) as client:
        if options.stats:
            return _list_statistics(options, client)
        disks = client.call(f"{MACHINE}.ListStorage")["storage"]
    names = tuple(_COLUMNS) if options.long else _SHORT

    def row(disk: dict[str, Any]) -> list[str]:
        return [_COLUMNS[name](disk) for name in names]

    return show(options, disks, "disks", names, row, right=("SIZE",), fit=not options.long)


def _state(disk: dict[str, Any]) -> str:
    removal = disk["removal"]
    if not removal:
        state = "boot" if disk["boot"] else str(disk["state"])
        return f"{state} (see -l)" if disk["notice"] else state
    forced = ", forced" if removal["forced"] else ""
    return f"{disk['state']} ({removal['pendingUSec'] / 1e6:.0f} s{forced})"


def _limits_text(limits: dict[str, int] | None) -> str:
    names = {"iops": "iops", "iopsRead": "iops-read", "iopsWrite": "iops-write"}
    names |= {"bps": "bps", "bpsRead": "bps-read", "bpsWrite": "bps-write"}
    words = [f"{name}={limits[key]}" for key, name in names.items() if limits and limits.get(key)]
    return ",".join(words) or "-"


_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "DISK": lambda disk: disk["name"],
    "BUS": lambda disk: disk["bus"],
    "SIZE": lambda disk: format_size(disk["sizeBytes"]) if disk["sizeBytes"] else "-",
    "STATE": _state,
    "BY-ID": lambda disk: disk["byId"].removeprefix("/dev/disk/by-id/"),
    "MODE": lambda disk: "ro" if disk["readOnly"] else "rw",
    "FORMAT": lambda disk: disk["format"] if disk["sizeBytes"] else "-",
    "PLACE": lambda disk: disk["place"],
    "SERIAL": lambda disk: disk["serial"],
    "DEVICE": lambda disk: disk["device"],
    "NODE": lambda disk: disk["node"] or "-",
    "LIMITS": lambda disk: _limits_text(disk["limits"]),
    "FILE": lambda disk: disk["path"] or "-",
    "BACKING": lambda disk: " on ".join(disk.get("backingFiles", ())) or "-",
    "NOTICE": lambda disk: disk["notice"] or "-",
}

#: The columns without --long.
_SHORT = ("DISK", "BUS", "SIZE", "STATE", "BY-ID")


def _list_statistics(options: argparse.Namespace, client: Client) -> None:
    """Show the totals since each disk was attached, and the rates over a second."""
    before = _statistics(client)
    start = time.monotonic()
    time.sleep(_STATISTICS_SECONDS)
    after = _statistics(client)
    seconds = time.monotonic() - start
    found = [
        {"name": name, **now, "perSecond": {key: (now[key] - before[name][key]) / seconds for key in now}}
        for name, now in after.items()
        if name in before
    ]
    columns = ("DISK", "READS", "READ", "WRITES", "WRITTEN", "FLUSHES", "FAILED", "READ/s", "WRITTEN/s", "IOPS")
    show(options, found, "disks", columns, _statistics_row, right=columns[1:])


def _statistics(client: Client) -> dict[str, dict[str, int]]:
    disks = client.call(f"{MACHINE}.ListStorage", {"statistics": True})["storage"]
    return {disk["name"]: disk["statistics"] for disk in disks if disk["statistics"]}


def _statistics_row(disk: dict[str, Any]) -> tuple[str, ...]:
    per_second = disk["perSecond"]
    return (
        disk["name"],
        str(disk["reads"]),
        format_size(disk["readBytes"]),
        str(disk["writes"]),
        format_size(disk["writtenBytes"]),
        str(disk["flushes"]),
        str(disk["failed"]),
        format_size(round(per_second["readBytes"])),
        format_size(round(per_second["writtenBytes"])),
        f"{per_second['reads'] + per_second['writes']:.0f}",
    )

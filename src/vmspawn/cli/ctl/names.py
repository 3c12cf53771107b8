# SPDX-License-Identifier: LGPL-2.1-or-later
"""Implements the hidden verb `__complete`, which prints names for the completion scripts."""

from __future__ import annotations

import argparse

from ...control.client import Client
from ...errors import VmspawnError
from ...host import machined
from ...host.runtime import machine_names
from ...images import snapshot_files
from .replies import MACHINE
from .verbs import Verbs

#: Seconds to wait for a machine that does not answer.
_TIMEOUT = 2.0


def add(verbs: Verbs) -> None:
    """Add the verb."""
    parser = verbs.add_hidden("__complete", _print_names)
    parser.add_argument("what", choices=("machines", "disks", "snapshots"), help=argparse.SUPPRESS)
    parser.add_argument("machine", nargs="?", default="", help=argparse.SUPPRESS)


def _print_names(options: argparse.Namespace) -> None:
    """Print one name per line. Prints nothing if the machine does not answer, because completion cannot show errors."""
    for name in sorted(_names(options.what, options.machine)):
        if "\n" not in name:
            print(name)


def _names(what: str, machine: str) -> set[str]:
    if what == "snapshots":
        return {*machine_names(), *snapshot_files.names()}
    return _disks(machine) if what == "disks" else _machines()


def _machines() -> set[str]:
    try:
        return {*machine_names(), *machined.machines()}
    except VmspawnError:
        return set()


def _disks(machine: str) -> set[str]:
    try:
        with Client(machine, timeout=_TIMEOUT) as client:
            return {disk["name"] for disk in client.call(f"{MACHINE}.ListStorage")["storage"]}
    except VmspawnError:
        return set()

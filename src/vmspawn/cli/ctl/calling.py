# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the verbs of vmctl share: whom they call, what they say when that fails, and how they show lists."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ...control.client import REPLY_TIMEOUT, Client
from ...errors import VmspawnError
from ..tables import print_json, print_table

INSTANCE = "io.systemd.MachineInstance"
MACHINE = "io.vmspawn.Machine"


def client_for(options: argparse.Namespace) -> Client:
    """A connection to the machine that the options name."""
    return Client(options.machine, timeout=REPLY_TIMEOUT if options.timeout is None else options.timeout)


def show(
    options: argparse.Namespace,
    found: list[dict[str, Any]],
    what: str,
    columns: tuple[str, ...],
    row: Callable[[dict[str, Any]], tuple[str, ...]],
    *,
    right: tuple[str, ...],
) -> None:
    """Print a list: as JSON for programs; as a table for people, or that there are none."""
    if options.json != "off":
        print_json(found, options.json)
    elif found:
        print_table(columns, [row(each) for each in found], right=right)
    elif not options.quiet:
        print(f"No {what}.")


class context:
    """Says what failed in front of why: that the machine `cannot` do something to a subject."""

    def __init__(self, what: str) -> None:
        """`what` is such as `cannot attach PATH`."""
        self._what = what
        # A path that cannot be opened need not be said twice.
        self._subject = what.split(" ", 2)[-1]

    def __enter__(self) -> None:
        pass

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, VmspawnError):
            why = str(error).removeprefix(f"cannot open {self._subject}: ")
            raise VmspawnError(f"{self._what}: {why}", hint=error.hint) from None

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Implements the verbs for snapshots of running machines, and for copies that start from snapshots."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

from ...control.client import REPLY_TIMEOUT, Client
from ...errors import UsageError
from ...host import runtime
from .. import copy_options
from ..entrypoint import exit_on_signals
from ..parser import Parser
from ..spelling import as_option
from ..tables import format_duration, format_size
from .forwards import forward_text
from .replies import MACHINE, answer, reply_timeout, say, show
from .verbs import Verbs

if TYPE_CHECKING:
    from ...snapshots.background import CopyOptions

#: Seconds without progress after which vmctl gives up a save.
_PROGRESS_TIMEOUT = 120.0

#: Seconds within which a copy must start.
_FORK_TIMEOUT = 60.0


def add(verbs: Verbs) -> None:
    """Add the verbs."""
    snapshot = verbs.add_for_machine(
        "snapshot", _snapshot, "save a running machine: its memory, devices and disks", "[NAME]"
    )
    snapshot.add_argument("name", metavar="NAME", nargs="?", help="name of the snapshot (default: a number)")
    snapshot.add_argument(
        "--detach-what-blocks",
        action="store_true",
        help="detach disks that cannot be saved, and attach them again afterwards",
    )
    fork = verbs.add("fork", _fork, "start copies of a machine from a snapshot", "MACHINE[@NAME] [NEW…]")
    _add_snapshot(fork, "MACHINE[@NAME]")
    fork.add_argument("names", metavar="NEW", nargs="*", help="names of the copies (default: one, MACHINE-forkN)")
    copy_options.add(fork)
    fork.add_argument(
        "--console",
        metavar="headless|gui",
        default="headless",
        help="show the guest's console: headless (default) or gui (in a window)",
    )
    fork.add_argument("--log", metavar="FILE", help="append the console's output to a file")
    fork.add_argument(
        "--forward",
        metavar="[ADDRESS:]PORT:GUESTPORT[/udp]",
        action="append",
        default=[],
        help="forward a port of the host to the copy; repeatable",
    )
    fork.add_argument("--die-with-parent", action="store_true", help="end the copies when the parent of vmctl dies")
    listing = verbs.add("list-snapshots", _list, "list snapshots", "[MACHINE]")
    listing.add_argument("machine", metavar="MACHINE", nargs="?", help="list only the snapshots of this machine")
    listing.add_argument("-l", "--long", action="store_true", help="also show disks and copies")
    remove = verbs.add("remove-snapshot", _remove, "remove a snapshot", "MACHINE@NAME")
    _add_snapshot(remove, "MACHINE@NAME")
    for verb in (fork, listing, remove):
        copy_options.add_directory(verb, "directory of the snapshots, as in vmspawn --snapshot-dir=")


def _add_snapshot(parser: Parser, metavar: str) -> None:
    parser.add_argument("snapshot", metavar=metavar, help="name of the snapshot; see: vmctl list-snapshots")


def _snapshot(options: argparse.Namespace) -> None:
    found = save(options, options.machine, options.name or "", detach=options.detach_what_blocks)
    name, pause = found["snapshot"], found["pauseUSec"] / 1e6
    answer(options, found, f"Saved {name} ({format_size(found['sizeBytes'])}); the guest was paused for {pause:.2f} s")
    for disk in found["disks"]:
        say(options, f"{disk['name']}: the guest writes to {disk['overlay']}; {disk['base']} stays as it is")


def save(
    options: argparse.Namespace, machine: str, name: str, *, temporary: bool = False, detach: bool = False
) -> dict[str, Any]:
    """Save a machine, with progress on a terminal, and return the last reply."""
    parameters = {"name": name or None, "temporary": temporary, "detachBlocking": detach}
    timeout = reply_timeout(options, _PROGRESS_TIMEOUT)
    is_shown = not options.quiet and options.json == "off" and sys.stderr.isatty()
    found: dict[str, Any] = {}
    with Client(machine, timeout=timeout) as client:
        for found in client.stream(f"{MACHINE}.Snapshot", parameters, forever=False):
            if is_shown and found.get("totalBytes"):
                done, total = found["doneBytes"], found["totalBytes"]
                text = f"{format_size(done)} of {format_size(total)}"
                print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        if is_shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
    return found


def _fork(options: argparse.Namespace) -> None:
    from ...snapshots import background, directory
    from ...snapshots.names import free_name

    machine, name = directory.parse_name(options.snapshot)
    names = [runtime.check_name(each) for each in options.names] or [free_name(machine)]
    if len(set(names)) < len(names):
        raise UsageError("two copies have the same name", hint="give each copy another name")
    timeout = reply_timeout(options, _FORK_TIMEOUT)
    with _spelled_as_options():
        wanted = _wanted(options)
        if not name:
            # Check before the machine is saved, because a snapshot for copies that cannot be started is useless.
            background.check(names, wanted)
        full_name = f"{machine}@{name}" if name else save(options, machine, "", temporary=True)["snapshot"]
        # The lock keeps the snapshot from being removed until a copy runs.
        with _removed_on_failure(machine), closing(directory.OpenSnapshot(full_name, wait=False)):
            stale = background.start_copies(full_name, names, wanted, timeout=timeout)
    found: dict[str, Any] = {"snapshot": full_name, "machines": names, "clock": "as saved" if stale else "set"}
    forwards = {each: _forwards(each) for each in names} if wanted.forwards else {}
    answer(options, found | {"forwards": forwards}, f"Started {', '.join(names)} from {full_name}")
    for copy, found_there in forwards.items():
        for each in found_there:
            say(options, f"{copy}: {forward_text(each)}")
    if stale:
        say(options, f"the clock shows the time of the snapshot: no agent runs in {', '.join(stale)}")


@contextlib.contextmanager
def _removed_on_failure(machine: str) -> Iterator[None]:
    """After an error, remove the snapshot that was made for the copies, if none of them runs."""
    try:
        yield
    except BaseException:
        from ...snapshots.merge import after_end

        after_end(machine)
        raise


@contextlib.contextmanager
def _spelled_as_options() -> Iterator[None]:
    """Spell the fields in errors as the options of `fork`, which are named as in vmspawn."""
    try:
        yield
    except UsageError as error:
        message, hint = error.spelled(partial(as_option, "vmspawn"))
        raise UsageError(message, hint=hint) from None


def _wanted(options: argparse.Namespace) -> CopyOptions:
    """Return the options of the copies. Raises UsageError."""
    from ...network.forward import parse
    from ...snapshots.background import CopyOptions

    return CopyOptions(
        keep_disks=options.keep,
        new_identity=options.identity == "new",
        force_version=options.force_version,
        console=options.console,
        console_log=os.path.abspath(options.log) if options.log else "",
        forwards=tuple(map(parse, options.forward)),
        parent=os.getppid() if options.die_with_parent else 0,
    )


def _forwards(machine: str) -> list[dict[str, Any]]:
    """Return the forwards of a copy, with the ports that were chosen."""
    with Client(machine, timeout=REPLY_TIMEOUT) as client:
        found: list[dict[str, Any]] = client.call(f"{MACHINE}.ListForwards")["forwards"]
        return found


def _list(options: argparse.Namespace) -> None:
    from ...snapshots.listing import listed

    snapshots = listed(must_exist=options.snapshot_dir is not None)
    found = [each._asdict() for each in snapshots if options.machine in (None, each.machine)]
    columns = ("SNAPSHOT", "SIZE", "AGE", "PARENT", *(("DISKS", "FORKS") if options.long else ()))

    def row(each: dict[str, Any]) -> tuple[str, ...]:
        age = format_duration(max(0.0, time.time() - each["created"]))
        cells = (each["name"], format_size(each["size"]), age, each["parent"] or "-")
        return (*cells, ", ".join(each["disks"]) or "-", ", ".join(each["forks"]) or "-") if options.long else cells

    show(options, found, "snapshots", columns, row, right=("SIZE", "AGE"))


def _remove(options: argparse.Namespace) -> None:
    from ...snapshots import directory, removal

    machine, name = directory.parse_name(options.snapshot)
    if not name:
        raise UsageError("the name of the snapshot is missing", hint=f"write {machine}@NAME; see: vmctl list-snapshots")
    # An interrupted merge ends its QEMU first.
    exit_on_signals()
    removal.remove(f"{machine}@{name}")
    say(options, f"Removed {machine}@{name}")

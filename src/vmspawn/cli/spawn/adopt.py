# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the options that adopt a machine whose manager died."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from ...boot.config import MachineConfig
from ...boot.launch import launch
from ...errors import UsageError
from ...host import runtime
from ..values import whole_number
from . import console, general

if TYPE_CHECKING:
    from ...boot.started import Started


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options to the command's parser."""
    group = parser.add_argument_group("Adoption")
    choice = group.add_mutually_exclusive_group()
    choice.add_argument("--adopt", action="store_true", help="manage the machine of --machine=, whose manager died")
    choice.add_argument(
        "--adopt-or-start",
        action="store_true",
        help="adopt the machine if it runs without a manager, else start it",
    )
    # For programs that start vmspawn in the background. When the machine is up, vmspawn writes one byte to this
    # descriptor: "0" if a copy's clock shows the time of the snapshot, else "1".
    group.add_argument("--ready-fd", metavar="FD", type=whole_number, help=argparse.SUPPRESS)


#: Options that are allowed with --adopt. The machine's start determined all others.
_BESIDE_ADOPT = (
    *("adopt", "snapshot_dir", "machine", "console", "log", "qmp_log"),
    *("shutdown_timeout", "time_limit", "quiet", "verbose"),
)


def refuse_others(
    options: argparse.Namespace,
    parser: argparse.ArgumentParser,
    *,
    beside: tuple[str, ...] = _BESIDE_ADOPT,
    refusal: str = "--adopt cannot change a running machine, and {name} configures its start",
    hint: str = "leave out {name}, or use --adopt-or-start",
) -> None:
    """Raise UsageError if an option configures a start, although `--adopt` or `--fork=` determines the machine.

    `beside` are the options that are allowed.
    """
    for action in (action for action in parser._actions if action.help != argparse.SUPPRESS):
        value = getattr(options, action.dest, action.default)
        if action.dest in beside or value == action.default or (action.nargs == 0 and value != action.const):
            continue
        name = action.option_strings[-1] + ("" if action.nargs == 0 else "=")
        raise UsageError(refusal.format(name=name), hint=hint.format(name=name))


def read(options: argparse.Namespace) -> MachineConfig:
    """Read the name of the machine to adopt, and the options for its manager. Raises UsageError."""
    if options.machine is None:
        raise UsageError("--adopt needs the name of a machine", hint="add --machine=NAME; see: vmctl list")
    if options.kernel_arguments:
        raise UsageError(
            f"--adopt starts no kernel, so it takes no kernel argument: {options.kernel_arguments[0]}",
            hint="leave out the argument",
        )
    wanted, shown = general.read(options), console.read(options)
    return MachineConfig(
        name=runtime.check_name(options.machine),
        console=shown["console"],
        console_log=shown["console_log"],
        shutdown_timeout=wanted["shutdown_timeout"],
        time_limit=wanted["time_limit"],
        qmp_log=wanted["qmp_log"],
    )


def is_wanted(options: argparse.Namespace, config: MachineConfig) -> bool:
    """Return whether to adopt the machine, instead of starting it."""
    if not options.adopt_or_start:
        return bool(options.adopt)
    from ...boot.adopt import has_orphan

    return has_orphan(config.name or "")


def begin(
    options: argparse.Namespace,
    config: MachineConfig,
    notice: Callable[[str], None],
    detail: Callable[[str], None],
    hold_signals: Callable[[], None],
) -> Started:
    """Start the machine, start a copy, or adopt the machine. Raises the errors of `launch`, `fork` and `adopt`."""
    if options.fork:
        from ...snapshots import directory
        from ...snapshots.fork import fork

        full_name = directory.find(*directory.parse_name(options.fork))
        return fork(
            config,
            full_name,
            keep_disks=options.keep,
            force_version=options.force_version,
            new_identity=options.identity == "new",
            parent=options.parent_pid,
            on_begin=hold_signals,
        )
    if is_wanted(options, config):
        from ...boot.adopt import adopt

        hold_signals()
        return adopt(config)
    if config.warm:
        from ...snapshots import warm

        return warm.start(config, notice=notice, detail=detail, on_begin=hold_signals)
    return launch(config, notice=notice, detail=detail, on_begin=hold_signals)


def on_ready(options: argparse.Namespace) -> Callable[[bool], None]:
    """Return the function to call once the machine is up."""

    def tell(is_clock_set: bool) -> None:
        if options.ready_fd is not None:
            os.write(options.ready_fd, b"1" if is_clock_set else b"0")
            os.close(options.ready_fd)

    return tell

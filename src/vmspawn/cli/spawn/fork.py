# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the options that start a copy of a machine from a snapshot."""

from __future__ import annotations

import argparse

from ...boot.config import MachineConfig
from ...errors import UsageError
from ...host import runtime
from .. import copy_options
from ..values import whole_number
from . import console, general, network

#: Options that are allowed with --fork=. The snapshot determines all others.
BESIDE = (
    *("fork", "keep", "identity", "force_version", "snapshot_dir", "machine", "console", "log", "qmp_log", "forward"),
    *("shutdown_timeout", "die_with_parent", "quiet", "verbose"),
)


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options to the command's parser."""
    group = parser.add_argument_group("Copies")
    group.add_argument("--fork", metavar="MACHINE[@NAME]", help="start a copy of a machine from its snapshot")
    copy_options.add_directory(group, "directory of the snapshots")
    copy_options.add(group)
    # The process id of a process that the copy must not outlive, for `vmctl fork --die-with-parent`.
    group.add_argument("--parent-pid", metavar="PID", type=whole_number, default=0, help=argparse.SUPPRESS)


def read(options: argparse.Namespace) -> MachineConfig:
    """Read the settings in which the copy differs from the source. Raises UsageError."""
    if options.kernel_arguments:
        raise UsageError(
            f"--fork= starts no kernel, so it takes no kernel argument: {options.kernel_arguments[0]}",
            hint="leave out the argument",
        )
    wanted, shown = general.read(options), console.read(options)
    name = runtime.check_name(options.machine) if options.machine else None
    return MachineConfig(
        name=name,
        console=shown["console"],
        console_log=shown["console_log"],
        forwards=network.read(options)["forwards"],
        terminal=shown["terminal"],
        shutdown_timeout=wanted["shutdown_timeout"],
        qmp_log=wanted["qmp_log"],
        die_with_parent=wanted["die_with_parent"],
    )

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the options that start a copy of a machine from a snapshot."""

from __future__ import annotations

import argparse
import os

from ...boot.config import MachineConfig
from ...errors import UsageError
from ...host import runtime
from ...images import snapshot_files
from . import console, general

#: Options that are allowed with --fork=. The snapshot determines all others.
BESIDE = (
    *("fork", "keep", "identity", "force_version", "snapshot_dir", "machine", "console", "log", "qmp_log"),
    *("shutdown_timeout", "die_with_parent", "quiet", "verbose"),
)


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options to the command's parser."""
    group = parser.add_argument_group("Copies")
    group.add_argument("--fork", metavar="MACHINE[@NAME]", help="start a copy of a machine from its snapshot")
    group.add_argument("--snapshot-dir", metavar="DIR", type=snapshot_directory, help="directory of the snapshots")
    group.add_argument("--keep", action="store_true", help="keep the disks of the copy when it ends")
    group.add_argument(
        "--identity",
        choices=("same", "new"),
        default="same",
        help="give the guest a host name, machine ID and MAC addresses of its own (default: %(default)s)",
    )
    group.add_argument(
        "--force-version", action="store_true", help="allow another QEMU than the one that saved the snapshot"
    )


def snapshot_directory(path: str) -> str:
    """Set the directory for snapshots, and return its absolute path."""
    # Managers that this process starts in the background use the directory too.
    os.environ[snapshot_files.VARIABLE] = os.path.abspath(path)
    return os.path.abspath(path)


def read(options: argparse.Namespace) -> MachineConfig:
    """Read the settings in which the copy differs from the source. Raises UsageError."""
    if options.kernel_arguments:
        raise UsageError(
            f"--fork= starts no kernel, so it takes no kernel argument: {options.kernel_arguments[0]}",
            hint="leave out the argument",
        )
    wanted, shown = general.read(options), console.read(options)
    if shown["console"] == "native":
        raise UsageError("--fork= does not work with --console=native", hint="use another --console=")
    name = runtime.check_name(options.machine) if options.machine else None
    return MachineConfig(
        name=name,
        console=shown["console"],
        console_log=shown["console_log"],
        terminal=shown["terminal"],
        shutdown_timeout=wanted["shutdown_timeout"],
        qmp_log=wanted["qmp_log"],
        die_with_parent=wanted["die_with_parent"],
    )

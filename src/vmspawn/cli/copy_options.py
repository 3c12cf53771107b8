# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the options for copies that `vmspawn --fork=` and `vmctl fork` share."""

from __future__ import annotations

import argparse
import os

from ..images import snapshot_files


def add(parser: argparse._ActionsContainer) -> None:
    """Add the options to a parser or to a group of options."""
    parser.add_argument("--keep", action="store_true", help="keep the disks of a copy when it ends")
    parser.add_argument(
        "--identity",
        choices=("same", "new"),
        default="same",
        help="with new, give the guest its own host name, machine ID and MAC addresses (default: %(default)s)",
    )
    parser.add_argument(
        "--force-version",
        action="store_true",
        help="allow another QEMU, firmware or processor than those that the snapshot was saved with",
    )


def add_directory(parser: argparse._ActionsContainer, text: str) -> None:
    """Add the option for the directory of all snapshots, with its help."""
    parser.add_argument("--snapshot-dir", metavar="DIR", type=_snapshot_directory, help=text)


def _snapshot_directory(path: str) -> str:
    """Set the directory for snapshots, in this process and in managers that it starts. Returns its absolute path."""
    os.environ[snapshot_files.VARIABLE] = os.path.abspath(path)
    return os.path.abspath(path)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Describes snapshots for lists.

This module is on vmctl's start path and imports next to nothing.
"""

from __future__ import annotations

import json
import os
from errno import EIO, ENOENT
from typing import Any, NamedTuple

from ..errors import SystemFailure
from ..host import runtime
from ..images import snapshot_files


class Listed(NamedTuple):
    """A snapshot in a list. `size` is the disk usage of its directory in bytes; `forks` are names of machines."""

    name: str
    machine: str
    created: float
    parent: str
    size: int
    disks: list[str]
    forks: list[str]
    has_state: bool


def listed(*, must_exist: bool = False) -> list[Listed]:
    """List all snapshots, the oldest first.

    Raises SystemFailure if their directory cannot be read, or, with `must_exist`, if it does not exist.
    """
    _check_readable(must_exist=must_exist)
    forks = _forks()
    found = [_describe(name, manifest, forks.get(name, [])) for name, manifest in snapshot_files.manifests()]
    return sorted(found, key=lambda each: each.created)


def _check_readable(*, must_exist: bool) -> None:
    folder = snapshot_files.root()
    try:
        # The dot can be looked up only if the directory's entries can be.
        os.scandir(os.path.join(folder, ".")).close()
    except OSError as error:
        if error.errno != ENOENT or must_exist:
            raise SystemFailure(f"cannot read the directory of snapshots {folder}", error.errno or EIO) from None


def _describe(name: str, manifest: dict[str, Any], forks: list[str]) -> Listed:
    disks = manifest["attachments"].get("storage", {}).get("attachments", ())
    return Listed(
        name,
        str(manifest["machine"]),
        float(manifest["created"]),
        str(manifest["parent"]),
        _size(os.path.join(snapshot_files.root(), name)),
        [str(each["name"]) for each in disks],
        sorted(forks),
        bool(manifest["state"]),
    )


def _size(folder: str) -> int:
    total = 0
    for name in os.listdir(folder):
        try:
            total += os.stat(os.path.join(folder, name)).st_blocks * 512
        except OSError:
            continue
    return total


def _forks() -> dict[str, list[str]]:
    """Return the machines that use each snapshot, according to the machines' state files."""
    found: dict[str, list[str]] = {}
    for name in runtime.machine_names():
        folder = os.path.join(runtime.runtime_root(), name)
        try:
            with open(os.path.join(folder, runtime.STATE), "rb") as file:
                snapshot = (json.load(file).get("fork") or {}).get("snapshot")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if snapshot and runtime.running_qemu(folder):
            found.setdefault(str(snapshot), []).append(name)
    return found

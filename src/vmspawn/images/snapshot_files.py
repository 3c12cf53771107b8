# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds snapshots, and the snapshot that a file is part of, and removes the remains of failed saves.

Each snapshot is a directory `MACHINE@NAME` with a manifest. This module is on the start path and imports next to
nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from ..user_directories import user_directory

MANIFEST = "manifest.json"

#: The environment variable that names the directory of all snapshots.
VARIABLE = "VMSPAWN_SNAPSHOT_DIR"

#: The prefix of the directory of an unfinished snapshot: it is being made, or its manager died while it was made.
UNFINISHED = ".new-"


def root() -> str:
    """Return the directory of all snapshots: `$VMSPAWN_SNAPSHOT_DIR`, or the user's default."""
    if explicit := os.environ.get(VARIABLE):
        return os.path.abspath(explicit)
    if os.geteuid() == 0:
        return "/var/lib/vmspawn/snapshots"
    base = user_directory("XDG_STATE_HOME", ".local/state")
    return os.path.join(base, "vmspawn", "snapshots") if base else "/nonexistent"


def names() -> list[str]:
    """Return the names of all snapshots, as `MACHINE@NAME`, sorted."""
    try:
        found = sorted(each for each in os.listdir(root()) if "@" in each and not each.startswith("."))
    except OSError:
        return []
    return [each for each in found if os.path.exists(os.path.join(root(), each, MANIFEST))]


def manifests() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each snapshot's name and manifest. Skips manifests that cannot be read."""
    for name in names():
        with contextlib.suppress(OSError, ValueError):
            found = _load(os.path.join(root(), name, MANIFEST))
            if isinstance(found, dict):
                yield name, found


def _load(path: str) -> Any:
    import json

    with open(path, "rb") as file:
        return json.load(file)


def current_folder(machine: str) -> str:
    """Return the directory of a machine's newest overlays."""
    return os.path.join(root(), f"{machine}@current")


def discard(folder: str) -> None:
    """Remove the directory of an unfinished snapshot."""
    import shutil

    if os.path.dirname(folder) == root() and os.path.basename(folder).startswith(UNFINISHED):
        shutil.rmtree(folder, ignore_errors=True)


def settle_current(machine: str, used: set[str]) -> None:
    """Keep or remove the unfinished manifest of a machine's newest overlays, after its manager has died.

    The manifest is kept if QEMU uses the overlays. `used` are the paths of the images of the machine's disks.
    """
    path = os.path.join(current_folder(machine), MANIFEST)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        if used & set(_load(path + ".new")["images"].values()):
            os.rename(path + ".new", path)
    tidy_current(machine, used)


def tidy_current(machine: str, used: set[str]) -> None:
    """Remove the remains of a failed save from the directory of a machine's newest overlays."""
    folder = current_folder(machine)
    try:
        names = os.listdir(folder)
    except OSError:
        return
    listed = {path for _, found in manifests() for path in found.get("images", {}).values()} | used
    for name in names:
        path = os.path.join(folder, name)
        is_overlay = name.endswith(".qcow2")
        if (is_overlay and path not in listed) or (not is_overlay and MANIFEST not in names):
            with contextlib.suppress(OSError):
                os.unlink(path)
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(folder, MANIFEST + ".new"))
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def owner_of(device: int, inode: int) -> str:
    """Return the name of the snapshot that a file is part of, or an empty string."""
    for name, manifest in manifests():
        for each in manifest.get("files", ()):
            if _is_file(each, device, inode):
                return name
    return ""


def _is_file(entry: dict[str, Any], device: int, inode: int) -> bool:
    """Return whether an entry describes a file, by its present path, or by its inode at the time of the save."""
    try:
        found = os.stat(entry["path"])
        if (found.st_dev, found.st_ino) == (device, inode):
            return True
    except (OSError, KeyError):
        pass
    return (entry.get("device"), entry.get("inode")) == (device, inode)

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
    # Without symbolic links, because the paths of files in it are compared with the paths of open files.
    return os.path.realpath(os.environ.get(VARIABLE) or _default_root())


def _default_root() -> str:
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


def readings() -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Yield each snapshot's name and manifest, or None for a manifest that cannot be read or is damaged."""
    for name in names():
        try:
            yield name, _load(os.path.join(root(), name, MANIFEST))
        except FileNotFoundError:
            continue  # the snapshot was removed meanwhile
        except (OSError, ValueError):
            yield name, None


def manifests() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each snapshot's name and manifest. Skips manifests that cannot be read or are damaged."""
    for name, found in readings():
        if found is not None:
            yield name, found


def _load(path: str) -> dict[str, Any]:
    """Read a manifest. Raises OSError, or ValueError if it is damaged."""
    import json

    with open(path, "rb") as file:
        found = json.load(file)
    if not _has_shape(found):
        raise ValueError(f"{path} is damaged")
    return dict(found)


def _has_shape(found: Any) -> bool:
    """Return whether a manifest has the fields that are read here and in lists of snapshots."""
    try:
        [str(each["name"]) for each in found["attachments"].get("storage", {}).get("attachments", ())]
        return (
            all(isinstance(each["path"], str) for each in found["files"])
            and all(isinstance(each[name], int) for each in found["files"] for name in ("device", "inode"))
            and all(isinstance(each, str) for each in found["images"].values())
            and all(isinstance(found[name], str) for name in ("machine", "parent"))
            and isinstance(found["created"], int | float)
            and "state" in found
        )
    except (KeyError, TypeError, AttributeError):
        return False


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
    """Remove the remains of a failed save from the directory of a machine's newest overlays.

    `used` are the paths of images that are not removed. Does nothing if another process is making files in the
    directory, or if a manifest cannot be read, because it may list the overlays.
    """
    import fcntl

    folder = current_folder(machine)
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return  # there is none, or something else has its name
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = [manifest for _, manifest in readings()]
        if None not in found:
            listed = {path for each in filter(None, found) for path in each["images"].values()}
            _tidy(fd, folder, listed | used)
    except OSError:
        return
    finally:
        os.close(fd)
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def _tidy(fd: int, folder: str, listed: set[str]) -> None:
    names = os.listdir(fd)
    identities = set(filter(None, map(_identity, listed)))
    for name in names:
        path = os.path.join(folder, name)
        is_overlay = name.endswith(".qcow2")
        is_listed = path in listed or _identity(path) in identities
        if (is_overlay and not is_listed) or (not is_overlay and MANIFEST not in names):
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=fd)
    with contextlib.suppress(OSError):
        os.unlink(MANIFEST + ".new", dir_fd=fd)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def owner_of(device: int, inode: int) -> str:
    """Return the name of the snapshot that a file is part of, or an empty string."""
    for name, manifest in manifests():
        for each in manifest["files"]:
            if _is_file(each, device, inode):
                return name
    return ""


def _is_file(entry: dict[str, Any], device: int, inode: int) -> bool:
    """Return whether an entry describes a file, by its present path, or by its inode at the time of the save."""
    return (device, inode) in (_identity(entry["path"]), (entry["device"], entry["inode"]))

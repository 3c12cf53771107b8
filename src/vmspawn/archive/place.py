# SPDX-License-Identifier: LGPL-2.1-or-later
"""Moves unpacked files to their place. A file under its final name is always complete.

An existing directory gets the new files, and keeps its permissions.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator

from ..errors import CopyFailed, SystemFailure
from .unpack import Unpacked


def place(work: str, root: str, target: str, unpacked: Unpacked) -> None:
    """Move `root` of the work directory to the path `target`. Raises CopyFailed, or SystemFailure."""
    source = os.path.join(work, root)
    try:
        for path, final in _conflicts(source, target):
            raise CopyFailed(
                f"cannot put {path!r} in the place of {final!r}: one of them is a directory",
                hint=f"remove {final!r} first",
            )
        new: list[tuple[str, str]] = []
        _move(source, target, root, new)
        folders = [(path, final) for path, final in new if path in unpacked.folders]
        # Inner directories come first: an outer directory's permissions may deny access, or let other users write.
        for path, final in sorted(_below(folders, unpacked), reverse=True):
            unpacked.finish(path, final)
    except OSError as error:
        raise SystemFailure(f"cannot write {error.filename!r}", error.errno or errno.EIO) from None


def _is_folder(path: str) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def _conflicts(source: str, target: str) -> Iterator[tuple[str, str]]:
    """Yield the conflicts: a directory in the place of another file, or a file in the place of a directory."""
    if not os.path.lexists(target):
        return
    if _is_folder(source) != _is_folder(target):
        yield source, target
    elif _is_folder(source):
        for name in os.listdir(source):
            yield from _conflicts(os.path.join(source, name), os.path.join(target, name))


def _move(source: str, target: str, path: str, new: list[tuple[str, str]]) -> None:
    """Move the archive's member `path` from `source` to `target`. Appends each path and its target to `new`."""
    if not (_is_folder(source) and _is_folder(target)):
        os.replace(source, target)
        new.append((path, target))
        return
    for name in os.listdir(source):
        _move(os.path.join(source, name), os.path.join(target, name), f"{path}/{name}", new)


def _below(new: list[tuple[str, str]], unpacked: Unpacked) -> Iterator[tuple[str, str]]:
    """Yield all new directories: the moved directories and the directories inside them."""
    moved = dict(new)
    for path in unpacked.folders:
        top = path
        while top and top not in moved:
            top = top.rpartition("/")[0]
        if top:
            yield path, moved[top] + path[len(top) :]

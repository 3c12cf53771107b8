# SPDX-License-Identifier: LGPL-2.1-or-later
"""Opens the files that a running QEMU has open, even if they were renamed or removed."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator

_DELETED = " (deleted)"

_COPY_SIZE = 1 << 20

#: The maximum number of searches for a file that seems to have been closed.
_ATTEMPTS = 10


class OpenFiles:
    """The open files of a process. The process may close a file at any moment, and reuse its number."""

    def __init__(self, pid: int) -> None:
        self._folder = f"/proc/{pid}/fd"

    def open(self, identity: tuple[int, ...], *, read_only: bool = True) -> int:
        """Open a file again; the caller owns the descriptor. Raises OSError."""
        for _ in range(_ATTEMPTS):
            for number in self._numbers(identity):
                try:
                    fd = self.open_number(number, read_only=read_only)
                except OSError as error:
                    if error.errno in (errno.ENOENT, errno.ENXIO):
                        continue  # it was closed meanwhile
                    raise
                if _identity(os.fstat(fd)) == identity:
                    return fd
                os.close(fd)
        raise FileNotFoundError(errno.ENOENT, "QEMU has closed the file")

    def _numbers(self, identity: tuple[int, ...]) -> Iterator[int]:
        for name in os.listdir(self._folder):
            with contextlib.suppress(OSError):
                if _identity(os.stat(os.path.join(self._folder, name))) == identity:
                    yield int(name)

    def open_number(self, number: int, *, read_only: bool = True) -> int:
        """Reopen the file of a descriptor of the process. Raises OSError."""
        mode = os.O_RDONLY if read_only else os.O_RDWR
        return os.open(os.path.join(self._folder, str(number)), mode | os.O_CLOEXEC | os.O_NONBLOCK)


def path_of_descriptor(fd: int) -> str:
    """Return the path of an open file, or an empty string if the file has none any more."""
    path = os.readlink(f"/proc/self/fd/{fd}")
    if path.endswith(_DELETED) or not path.startswith("/"):
        return ""
    try:
        return path if os.path.samestat(os.stat(path), os.fstat(fd)) else ""
    except OSError:
        return ""


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return (found.st_rdev,) if stat.S_ISBLK(found.st_mode) else (found.st_dev, found.st_ino)


def keep(fd: int, path: str) -> None:
    """Give an unnamed file a path, or copy its content to the path if the kernel refuses. Raises OSError."""
    if not give_name(fd, path):
        copy(fd, path)


def give_name(fd: int, path: str) -> bool:
    """Give a path to a file without a name. Returns False if the kernel refuses, as it does on another file system."""
    folder = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Python follows the link only if it is relative to a directory's descriptor.
        os.link(str(fd), path, src_dir_fd=folder, follow_symlinks=True)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(folder)


def copy(fd: int, path: str, *, is_synced: bool = True, on_step: Callable[[], None] = lambda: None) -> None:
    """Copy an open file's content to a new file, and write it to the disk if `is_synced` is true. Raises OSError."""
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        copy_content(fd, target, on_step=on_step)
        if is_synced:
            os.fsync(target)
    finally:
        os.close(target)


def copy_content(fd: int, target: int, *, on_step: Callable[[], None] = lambda: None) -> None:
    """Copy an open file's content, except holes, to an empty file. Calls `on_step` before each piece.

    Raises OSError, or what `on_step` raises.
    """
    size = os.fstat(fd).st_size
    os.ftruncate(target, size)
    offset = 0
    while offset < size:
        try:
            begin = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError:
            return  # the rest is a hole
        offset = os.lseek(fd, begin, os.SEEK_HOLE)
        while begin < offset:
            on_step()
            data = os.pread(fd, min(_COPY_SIZE, offset - begin), begin)
            if not data:
                return
            begin += os.pwrite(target, data, begin)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Packs files and directories of the host into a tar archive, in the format that every tar in a guest reads.

A directory has two members. The first precedes the directory's content, and creates the directory. The second follows
the content, and sets the permissions and the time: a read-only directory would prevent unpacking its content, and
unpacking would change the time. A file with holes is empty in the archive. Its data is sent separately, because tar of
busybox does not support holes.
"""

from __future__ import annotations

import errno
import os
import stat
import tarfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..errors import CopyFailed, SystemFailure, UsageError
from .reader import Piece

_CHUNK = 256 * 1024
_BLOCK = 512
_END = bytes(2 * _BLOCK)

#: A file is sent without its holes if they have at least this size in total.
_HOLES_MIN = 1 << 20

#: Pieces of data are sent in units of this size. Smaller holes between two pieces are sent as zeros.
UNIT = 64 * 1024


class SparseFile(NamedTuple):
    """A file with holes: its paths on the host and in the archive, its size, and its data in whole units."""

    path: str
    name: str
    size: int
    time: int
    pieces: tuple[Piece, ...]


class _Entry(NamedTuple):
    path: str
    name: str
    status: os.stat_result


class Packer:
    """An archive of some files and directories, each under its own name."""

    def __init__(self, sources: Sequence[str], *, skip_special: bool = False) -> None:
        """Inspect all files. Raises UsageError, SystemFailure, or CopyFailed for a file that cannot be copied."""
        self.names = [name_of(each) for each in sources]
        if len(set(self.names)) < len(self.names):
            raise UsageError("two of the files to copy have the same name", hint="copy them one by one")
        #: Lines about files that were left out.
        self.skipped: list[str] = []
        self._skip_special = skip_special
        self._inodes: dict[tuple[int, int], str] = {}
        self._entries: list[_Entry] = []
        #: The files with holes, once `blocks` has been read.
        self.sparse: list[SparseFile] = []
        try:
            for source, name in zip(sources, self.names, strict=True):
                self._scan(source, name)
        except OSError as error:
            raise _failure(error) from None
        #: The directories whose time has to be set again, with that time. busybox's tar changes it: if the target of a
        #: symbolic link is absolute or contains `..`, tar creates the link last, after setting the directory's time.
        self.late: list[tuple[str, int]] = []
        #: The number of bytes in all files, without their holes.
        self.total = sum(_data_size(each.status) for each in self._entries)

    def _scan(self, path: str, name: str) -> None:
        pending = [(path, name)]
        while pending:
            path, name = pending.pop()
            status = os.lstat(path)
            kind = stat.S_IFMT(status.st_mode)
            if kind not in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
                self._refuse_or_skip(path)
                continue
            self._entries.append(_Entry(path, name, status))
            if kind == stat.S_IFDIR:
                pending += [(f"{path}/{each}", f"{name}/{each}") for each in sorted(os.listdir(path), reverse=True)]

    def _refuse_or_skip(self, path: str) -> None:
        why = f"{path!r} is a device, a socket or a pipe"
        if not self._skip_special:
            raise CopyFailed.with_fields("{why}", hint="leave out special files with {skip_special=True}", why=why)
        self.skipped.append(why)

    def blocks(self) -> Iterator[bytes]:
        """Yield the archive. Raises CopyFailed or SystemFailure if a file has changed or cannot be read."""
        open_folders: list[_Entry] = []
        try:
            for entry in self._entries:
                while open_folders and not entry.name.startswith(open_folders[-1].name + "/"):
                    yield _header(open_folders.pop())
                if stat.S_ISDIR(entry.status.st_mode):
                    open_folders.append(entry)
                    yield _header(entry, mode=0o700)
                else:
                    yield from self._file(entry, open_folders[-1] if open_folders else None)
            while open_folders:
                yield _header(open_folders.pop())
        except OSError as error:
            raise _failure(error) from None
        yield _END

    def _file(self, entry: _Entry, open_folder: _Entry | None) -> Iterator[bytes]:
        status = entry.status
        if stat.S_ISLNK(status.st_mode):
            target = os.readlink(entry.path)
            if open_folder is not None and (target.startswith("/") or ".." in target):
                self.late.append((open_folder.name, int(open_folder.status.st_mtime)))
            yield _header(entry, type=tarfile.SYMTYPE, target=target)
            return
        key = (status.st_dev, status.st_ino)
        if status.st_nlink > 1 and key in self._inodes:
            yield _header(entry, type=tarfile.LNKTYPE, target=self._inodes[key])
            return
        self._inodes[key] = entry.name
        fd = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            yield from self._content(fd, entry)
        except OSError as error:
            raise _failure(error, entry.path) from None
        finally:
            os.close(fd)

    def _content(self, fd: int, entry: _Entry) -> Iterator[bytes]:
        now = os.fstat(fd)
        if not stat.S_ISREG(now.st_mode):
            raise CopyFailed(f"{entry.path!r} was replaced meanwhile")
        entry = entry._replace(status=now)
        pieces = _pieces(fd, now)
        if pieces is not None:
            self.sparse.append(SparseFile(entry.path, entry.name, now.st_size, int(now.st_mtime), pieces))
            yield _header(entry)
            return
        yield _header(entry, size=now.st_size)
        left = now.st_size
        while left:
            data = os.read(fd, min(left, _CHUNK))
            if not data:
                raise CopyFailed(f"{entry.path!r} became shorter while it was copied")
            left -= len(data)
            yield data
        yield bytes(-now.st_size % _BLOCK)


def data_of(file: SparseFile, pieces: Sequence[Piece]) -> Iterator[bytes]:
    """Yield the data of some pieces of a file, in whole units: zeros fill a piece's last unit. Raises SystemFailure."""
    try:
        fd = os.open(file.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            for offset, length in pieces:
                for position in range(offset, offset + length, UNIT):
                    yield os.pread(fd, UNIT, position).ljust(UNIT, b"\0")
        finally:
            os.close(fd)
    except OSError as error:
        raise _failure(error, file.path) from None


def check_path(path: str) -> None:
    """Raise UsageError for a NUL character, which no path can contain."""
    if "\0" in path:
        raise UsageError(f"the path {path!r} contains a NUL character", hint="remove that character")


def name_of(path: str) -> str:
    """Return the name under which a path is copied. Raises UsageError."""
    check_path(path)
    if not path:
        raise UsageError("the path of the source is empty", hint="name a file or a directory")
    name = path.rstrip("/").rpartition("/")[2]
    if name in ("", ".", ".."):
        raise UsageError(f"{path} has no name to copy it under", hint="name a file or a directory")
    return name


def _header(
    entry: _Entry, *, type: bytes | None = None, size: int = 0, mode: int | None = None, target: str = ""
) -> bytes:
    """Return a header. The owner is root, because the guest does not have the host's users."""
    made = tarfile.TarInfo(entry.name)
    is_folder = stat.S_ISDIR(entry.status.st_mode)
    made.type = type or (tarfile.DIRTYPE if is_folder else tarfile.REGTYPE)
    made.mode = stat.S_IMODE(entry.status.st_mode) if mode is None else mode
    made.mtime = int(entry.status.st_mtime)
    made.size = size
    made.linkname = target
    return made.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def _data_size(status: os.stat_result) -> int:
    return min(status.st_size, status.st_blocks * 512) if stat.S_ISREG(status.st_mode) else 0


def _pieces(fd: int, status: os.stat_result) -> tuple[Piece, ...] | None:
    """Return the ranges that contain data of a file with large holes, in whole units; None for any other file."""
    size = status.st_size
    if size - status.st_blocks * 512 < _HOLES_MIN:
        return None
    found: list[Piece] = []
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        first, last = start // UNIT * UNIT, -(-end // UNIT) * UNIT
        if found and first <= found[-1].offset + found[-1].length:
            first = found.pop().offset
        found.append(Piece(first, last - first))
    return tuple(found)


def _failure(error: OSError, path: str = "") -> SystemFailure:
    """Return the error for a failed system call. If the call used a descriptor, `path` is the descriptor's file."""
    return SystemFailure(f"cannot read {path or error.filename!r}", error.errno or errno.EIO)

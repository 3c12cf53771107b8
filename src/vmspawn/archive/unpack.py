# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unpacks an archive from a guest, which may be hostile, into an empty directory, the work directory.

No symbolic link is followed, because only the user can enter the work directory, and symbolic links are made last. No
name can lead out of the work directory:

1. A name is relative, has no `..`, and begins with the requested name.
2. The name's directory is an earlier member of the archive.
3. A symbolic link's target is below the requested name: `..` is allowed only at the target's beginning, and must not
   lead above the requested name.
4. Devices, sockets and pipes are refused. Set-user-ID bits and owners are ignored.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from ..errors import CopyFailed, SystemFailure
from .reader import Kind, Member, Piece, Reader

#: The maximum number of files, directories and links in one archive. Linux's source tree has 100 000.
ENTRIES_MAX = 500_000

#: The maximum number of characters that are kept until the end: names of directories, names and targets of symbolic
#: links, and lines about skipped members.
_NAMES_MAX = 64 << 20

#: Data is written in blocks of this size. A block of zeros becomes a hole.
_HOLE = 64 * 1024
_ZEROS = bytes(_HOLE)

#: The maximum depth of directories. `shutil.rmtree`, which removes a failed copy, calls itself for each level.
_DEPTH_MAX = 256

_PERMISSIONS = 0o777


class _Folder(NamedTuple):
    mode: int
    time: int


class _Link(NamedTuple):
    target: str
    time: int


class Unpacked:
    """The directories that were unpacked into a work directory."""

    def __init__(self) -> None:
        self.folders: dict[str, _Folder] = {}
        #: Lines about members that were left out.
        self.skipped: list[str] = []

    def finish(self, path: str, final: str) -> None:
        """Give a directory at `final`, which was unpacked as `path`, its permissions and time."""
        mode, time = self.folders[path]
        os.chmod(final, mode)
        os.utime(final, (time, time))


def unpack(
    stream: BinaryIO,
    work: str,
    *,
    root: str,
    skip_special: bool = False,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Unpacked:
    """Unpack an archive of the file or directory `root` into the empty directory `work`, which only the user may enter.

    Only the user can enter the new directories until `finish` is called for each. `skip_special` leaves out devices and
    symbolic links that lead out of the source, instead of refusing them. `on_progress` is called with the number of
    bytes in each piece of a file's data.

    Raises CopyFailed or SystemFailure, and leaves a part of the archive in `work`.
    """
    try:
        fd = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise SystemFailure(f"cannot open {work}", error.errno or errno.EIO) from None
    try:
        return _Unpacker(fd, root, skip_special=skip_special, on_progress=on_progress).run(Reader(stream))
    finally:
        os.close(fd)


class _Unpacker:
    def __init__(self, fd: int, root: str, *, skip_special: bool, on_progress: Callable[[int], None]) -> None:
        self._fd = fd
        self._root = root
        self._skip_special = skip_special
        self._on_progress = on_progress
        self._found = Unpacked()
        self._links: dict[str, _Link] = {}
        self._entries = 0
        self._names = 0
        status = os.fstatvfs(fd)
        self._room = status.f_bavail * status.f_frsize

    def run(self, reader: Reader) -> Unpacked:
        for member in reader.members():
            self._entries += 1
            if self._entries > ENTRIES_MAX:
                raise CopyFailed(f"the guest sent more than {ENTRIES_MAX} files")
            path = self._path(member.name)
            try:
                self._make(path, member, reader)
            except OSError as error:
                raise self._failure(path, error) from None
        if not self._entries:
            raise CopyFailed("the guest sent an empty archive")
        for path, link in self._links.items():
            try:
                os.symlink(link.target, path, dir_fd=self._fd)
                os.utime(path, (link.time, link.time), dir_fd=self._fd, follow_symlinks=False)
            except OSError as error:
                raise self._failure(path, error) from None
        return self._found

    def _failure(self, path: str, error: OSError) -> CopyFailed | SystemFailure:
        if error.errno == errno.EEXIST:
            return CopyFailed(f"the guest sent {path!r} twice")
        if error.errno == errno.ENOENT:
            return CopyFailed(f"{path!r} is a hard link to a file that was not sent")
        return SystemFailure(f"cannot write {path!r}", error.errno or errno.EIO)

    def _path(self, name: str) -> str:
        """Return a member's path below the work directory. Raises CopyFailed for an invalid or unrequested name."""
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if name.startswith("/") or ".." in parts or not parts or parts[0] != self._root:
            raise CopyFailed(f"the guest sent {name!r}, which is not below {self._root!r}")
        if len(parts) > _DEPTH_MAX:
            raise CopyFailed(f"the guest sent directories nested more than {_DEPTH_MAX} levels deep")
        path = "/".join(parts)
        parent = path.rpartition("/")[0]
        if parent and parent not in self._found.folders:
            raise CopyFailed(f"the guest sent {path!r} before its directory")
        return path

    def _make(self, path: str, member: Member, reader: Reader) -> None:
        match member.kind:
            case Kind.FOLDER:
                self._make_folder(path, member)
            case Kind.FILE:
                self._make_file(path, member, reader)
            case Kind.HARDLINK:
                self._make_hard_link(path, member)
            case Kind.SYMLINK:
                self._add_symlink(path, _Link(member.target, _time(member)))
            case Kind.SPECIAL:
                self._refuse_or_skip(f"{path!r} is a device, a socket or a pipe")

    def _refuse_or_skip(self, why: str) -> None:
        if not self._skip_special:
            raise CopyFailed.with_fields("{why}", hint=_SKIP_HINT, why=why)
        self._count_names(why)
        self._found.skipped.append(why)

    def _count_names(self, *names: str) -> None:
        self._names += sum(map(len, names))
        if self._names > _NAMES_MAX:
            raise CopyFailed(f"the guest sent names of more than {_NAMES_MAX >> 20} MiB")

    def _make_folder(self, path: str, member: Member) -> None:
        if path not in self._found.folders:
            self._count_names(path)
            os.mkdir(path, 0o700, dir_fd=self._fd)
        self._found.folders[path] = _Folder(member.mode & _PERMISSIONS, _time(member))

    def _add_symlink(self, path: str, link: _Link) -> None:
        if path in self._links:
            raise CopyFailed(f"the guest sent {path!r} twice")
        if path == self._root and not self._skip_special:
            why, hint = f"{path!r} is a symbolic link, to {link.target!r}", "copy the file that the link leads to"
            raise CopyFailed(why, hint=hint)
        if _leads_out(path, link.target):
            self._refuse_or_skip(f"{path!r} is a symbolic link that leads out of the source, to {link.target!r}")
            return
        self._count_names(path, link.target)
        self._links[path] = link

    def _make_hard_link(self, path: str, member: Member) -> None:
        target = self._path(member.target)
        if target in self._links:
            self._add_symlink(path, self._links[target])
            return
        os.link(target, path, src_dir_fd=self._fd, dst_dir_fd=self._fd, follow_symlinks=False)

    def _make_file(self, path: str, member: Member, reader: Reader) -> None:
        self._room -= member.data_size
        if self._room < 0:
            raise CopyFailed(f"there is not enough free space for {path!r}, which has {member.data_size} bytes")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(path, flags, 0o600, dir_fd=self._fd)
        try:
            for offset, data in _placed(member.pieces, reader.content()):
                _write(fd, offset, data)
                self._on_progress(len(data))
            os.ftruncate(fd, member.size)
            os.fchmod(fd, member.mode & _PERMISSIONS)
            os.utime(fd, (_time(member), _time(member)))
        finally:
            os.close(fd)


_SKIP_HINT = "leave out special files with {skip_special=True}"


def _leads_out(path: str, target: str) -> bool:
    """Return whether a symbolic link may lead out of the requested directory."""
    parts = [part for part in target.split("/") if part not in ("", ".")]
    ups = next((number for number, part in enumerate(parts) if part != ".."), len(parts))
    # `..` may lead up to the requested directory, and no higher.
    return not target or target.startswith("/") or ".." in parts[ups:] or ups > path.count("/") - 1


def _time(member: Member) -> int:
    """Return a member's time, limited to the range that file systems support."""
    return max(-(1 << 33), min(member.time, 1 << 34))


def _placed(pieces: tuple[Piece, ...], content: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield the data with the offset where it belongs."""
    data = b""
    for offset, length in pieces:
        while length:
            data = data or next(content)
            yield offset, data[:length]
            count = min(length, len(data))
            data, offset, length = data[count:], offset + count, length - count


def _write(fd: int, offset: int, data: bytes) -> None:
    """Write data, except blocks of zeros, which stay holes."""
    view = memoryview(data)
    for start in range(0, len(view), _HOLE):
        block = view[start : start + _HOLE]
        if block == _ZEROS[: len(block)]:
            continue
        while block:
            count = os.pwrite(fd, block, offset + start)
            block, start = block[count:], start + count

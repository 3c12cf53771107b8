# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads tar archives that a guest sends, which may be hostile.

The format is that of GNU tar's --format=gnu and of busybox's tar, without pax headers. Python's tarfile would read pax
headers of any size into memory, so only its parser of single headers is used. The use of memory is bounded.

1. A header is 512 bytes with a checksum.
2. An extra header of type L, with a name that is longer than 100 bytes, comes before the header of the member with this
   name. An extra header of type K has the target of a link in the same way.
3. A header of type S has a map of the file's data, which continues in the blocks after it.
4. The content follows, padded to 512 bytes. Two blocks of zeros end the archive.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from enum import Enum
from typing import BinaryIO, NamedTuple

from ..errors import CopyFailed

#: The maximum length of a name and of a link's target, as in Linux (PATH_MAX).
_NAME_MAX = 4096

#: The maximum number of pieces of data in a sparse file. A file that tar has packed has one piece for each extent.
_PIECES_MAX = 100_000

#: The maximum size of a file on Linux (off_t).
_SIZE_MAX = (1 << 63) - 1

_BLOCK = 512
_CHUNK = 256 * 1024

#: The number of entries in each block after an old GNU sparse header, and the size of an entry (GNU tar's tar.h).
_EXTRA_ENTRIES = 21
_ENTRY_SIZE = 24


class Kind(Enum):
    """The kinds of members."""

    FILE = "file"
    FOLDER = "folder"
    SYMLINK = "symbolic link"
    HARDLINK = "hard link"
    SPECIAL = "device, socket or pipe"


_KINDS = {
    tarfile.REGTYPE: Kind.FILE,
    tarfile.AREGTYPE: Kind.FILE,
    tarfile.CONTTYPE: Kind.FILE,
    tarfile.GNUTYPE_SPARSE: Kind.FILE,
    tarfile.DIRTYPE: Kind.FOLDER,
    tarfile.SYMTYPE: Kind.SYMLINK,
    tarfile.LNKTYPE: Kind.HARDLINK,
    tarfile.CHRTYPE: Kind.SPECIAL,
    tarfile.BLKTYPE: Kind.SPECIAL,
    tarfile.FIFOTYPE: Kind.SPECIAL,
}


class Piece(NamedTuple):
    """A range of a file that contains data. The ranges between the pieces are holes."""

    offset: int
    length: int


class Member(NamedTuple):
    """A member of an archive, with a name that is not checked."""

    name: str
    kind: Kind
    mode: int
    time: int
    #: The size of the file, holes included.
    size: int
    target: str
    pieces: tuple[Piece, ...]

    @property
    def data_size(self) -> int:
        """The number of bytes of the file's data in the archive."""
        return sum(each.length for each in self.pieces)


class Truncated(CopyFailed):
    """The archive ended early."""

    def __init__(self) -> None:
        super().__init__("the guest's archive ended early")


class Reader:
    """Reads an archive member by member. After `members` has yielded a member, `content` yields the member's data."""

    def __init__(self, stream: BinaryIO) -> None:
        """Begin at the first member.

        `stream` is a BufferedReader: its `read` returns less than requested only at the end.
        """
        self._stream = stream
        #: Unread bytes of the current member's content and padding.
        self._left = 0
        self._padding = 0

    def members(self) -> Iterator[Member]:
        """Yield the members to the end of the archive. Raises CopyFailed."""
        long: dict[bytes, str] = {}
        while (header := self._header()) is not None:
            if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
                if header.type in long:
                    raise CopyFailed("the guest's archive has two long names for one member")
                long[header.type] = self._long_name(header)
                continue
            name = long.pop(tarfile.GNUTYPE_LONGNAME, header.name)
            target = long.pop(tarfile.GNUTYPE_LONGLINK, header.linkname)
            yield self._member(header, name, target)
            self._skip(self._left + self._padding)
            self._left = self._padding = 0

    def content(self) -> Iterator[bytes]:
        """Yield the data of the current member, without its holes. Raises CopyFailed."""
        while self._left:
            data = self._stream.read(min(self._left, _CHUNK))
            if not data:
                raise Truncated
            self._left -= len(data)
            yield data

    def _member(self, header: tarfile.TarInfo, name: str, target: str) -> Member:
        kind = _KINDS.get(header.type)
        if kind is None:
            raise CopyFailed(f"the guest's archive has a member of type {header.type!r}, which is not known")
        pieces: tuple[Piece, ...] = ()
        size = stored = header.size if kind is Kind.FILE else 0
        if header.type == tarfile.GNUTYPE_SPARSE:
            size, pieces = self._sparse(header)
        elif stored:
            pieces = (Piece(0, stored),)
        self._left, self._padding = stored, -stored % _BLOCK
        return Member(name, kind, header.mode, int(header.mtime), size, target, pieces)

    def _header(self) -> tarfile.TarInfo | None:
        block = self._read(_BLOCK)
        if not block.strip(b"\0"):
            return None
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise CopyFailed(f"the guest sent data that is not an archive: {error}") from None
        if header.size < 0:
            raise CopyFailed("the guest's archive has a member of a negative size")
        return header

    def _long_name(self, header: tarfile.TarInfo) -> str:
        if header.size > _NAME_MAX + 1:
            raise CopyFailed(f"the guest's archive has a name of {header.size} bytes")
        data = self._read(header.size + -header.size % _BLOCK)[: header.size]
        return data.partition(b"\0")[0].decode("utf-8", "surrogateescape")

    def _sparse(self, header: tarfile.TarInfo) -> tuple[int, tuple[Piece, ...]]:
        """Read the map of a sparse file. Returns the file's size and its pieces of data."""
        structs, is_extended, size = header._sparse_structs  # type: ignore[attr-defined]
        found = [Piece(*each) for each in structs]
        while is_extended:
            block = self._read(_BLOCK)
            is_extended = bool(block[_EXTRA_ENTRIES * _ENTRY_SIZE])
            found += _entries(block)
            if len(found) > _PIECES_MAX:
                raise CopyFailed(f"a sparse file of the guest has more than {_PIECES_MAX} pieces")
        pieces = tuple(each for each in found if each.length)
        _check(pieces, size, header.size)
        return size, pieces

    def _skip(self, count: int) -> None:
        while count:
            count -= len(self._read(min(count, _CHUNK)))

    def _read(self, count: int) -> bytes:
        data = self._stream.read(count)
        if len(data) < count:
            raise Truncated
        return data


def _entries(block: bytes) -> Iterator[Piece]:
    for position in range(0, _EXTRA_ENTRIES * _ENTRY_SIZE, _ENTRY_SIZE):
        entry = block[position : position + _ENTRY_SIZE]
        if not entry.strip(b"\0"):
            return
        try:
            offset, length = (tarfile.nti(part) for part in (entry[:12], entry[12:]))  # type: ignore[attr-defined]
        except (tarfile.TarError, ValueError) as error:
            raise CopyFailed(f"the map of a sparse file cannot be read: {error}") from None
        yield Piece(offset, length)


def _check(pieces: tuple[Piece, ...], size: int, stored: int) -> None:
    """Raise CopyFailed unless the pieces are in order, lie within the file, and have the stored data's total size."""
    if size > _SIZE_MAX:
        raise CopyFailed(f"the guest's archive has a file of {size} bytes")
    end = 0
    for offset, length in pieces:
        if offset < end or length < 0:
            raise CopyFailed("the map of a sparse file is not in order")
        end = offset + length
    if end > size or sum(each.length for each in pieces) != stored:
        raise CopyFailed("the map of a sparse file does not fit its size")

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writes initramfs archives, in cpio's "newc" format.

The kernel's Documentation/driver-api/early-userspace/buffer-format.rst describes the format. The same input makes the
same bytes: all times are 0, and root owns all files.
"""

from __future__ import annotations

import stat
from typing import BinaryIO


class Initramfs:
    """Writes entries to a file, which the caller keeps. `close` ends the archive."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._entries = 0
        self._directories: set[str] = set()

    def add_directory(self, path: str, mode: int = 0o755) -> None:
        """Add a directory and its parents; those that were added before are skipped."""
        if path in self._directories:
            return
        self._add_parents(path)
        self._directories.add(path)
        self._write(path, stat.S_IFDIR | mode)

    def add_file(self, path: str, content: bytes, *, executable: bool = False) -> None:
        """Add a regular file and its parent directories."""
        self._add_parents(path)
        self._write(path, stat.S_IFREG | (0o755 if executable else 0o644), content)

    def add_link(self, path: str, target: str) -> None:
        """Add a symbolic link and its parent directories."""
        self._add_parents(path)
        self._write(path, stat.S_IFLNK | 0o777, target.encode())

    def add_character_device(self, path: str, major: int, minor: int) -> None:
        """Add a character device and its parent directories."""
        self._add_parents(path)
        self._write(path, stat.S_IFCHR | 0o600, device=(major, minor))

    def close(self) -> None:
        """Write the trailer."""
        self._write("TRAILER!!!", 0)

    def _add_parents(self, path: str) -> None:
        parent = path.rpartition("/")[0]
        if parent:
            self.add_directory(parent)

    def _write(self, path: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        name = path.encode() + b"\0"
        self._entries += 1
        # inode, mode, uid, gid, links, time, size, device of the file system (2), device, length of name, checksum
        fields = (self._entries, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        self._file.write(_padded(header + name) + _padded(content))


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Mounts small file systems for tests, and fills them."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import MIB

#: The unit in which tmpfs counts space.
PAGE = os.sysconf("SC_PAGE_SIZE")


class SmallDisk:
    """A mounted file system with a directory for tests, and with a file that takes the free space."""

    def __init__(self, mount: Path) -> None:
        self.folder = mount / "folder"
        self._mount = mount
        self._filler = mount / "filler"

    def fill(self, pages_left: int = 0) -> None:
        """Take all free space except for a number of pages."""
        self.empty()
        with self._filler.open("wb") as file:
            found = os.statvfs(self._mount)
            size = found.f_bavail * found.f_frsize - pages_left * PAGE
            if size > 0:
                os.posix_fallocate(file.fileno(), 0, size)

    def empty(self) -> None:
        """Free the space that `fill` took."""
        self._filler.unlink(missing_ok=True)


@contextlib.contextmanager
def mounted(folder: Path, size: int, *, is_lazy: bool = False) -> Iterator[Path]:
    """Mount a file system of `size` bytes in memory. Skips the test if this user cannot.

    `is_lazy` is for a file system that is still in use at the end of the test.
    """
    if os.geteuid() != 0:
        pytest.skip("only root mounts a small file system")
    folder.mkdir()
    if not _ran("mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "none", str(folder)):
        pytest.skip("mount(8) is refused")
    try:
        yield folder
    finally:
        assert _ran("umount", *(["--lazy"] if is_lazy else []), str(folder))


@contextlib.contextmanager
def small_disk(mount: Path, size: int = 256 * MIB) -> Iterator[SmallDisk]:
    """Mount a file system in memory that can be filled. Skips the test if this user cannot."""
    with mounted(mount, size):
        found = SmallDisk(mount)
        found.folder.mkdir(mode=0o700)
        yield found


def _ran(*command: str) -> bool:
    return subprocess.run(command, check=False).returncode == 0

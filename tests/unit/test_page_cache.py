# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests reads that the page cache answers without waiting for the disk."""

import asyncio
import errno
import os
import time
from pathlib import Path

import pytest

from tests.conftest import make_qcow2
from vmspawn.storage import images
from vmspawn.storage.backing import open_disk
from vmspawn.storage.page_cache import read_cached


def cached_file(path: Path, data: bytes) -> int:
    """Write a file whose pages are in the page cache. Skips the test if cached pages cannot be recognized."""
    path.write_bytes(data)
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except OSError:
        os.close(fd)
        pytest.skip("the file system of this test cannot read without waiting")
    return fd


def test_cached_pages_are_read(tmp_path: Path) -> None:
    fd = cached_file(tmp_path / "file", b"0123456789")
    assert read_cached(fd, 4, 3) == b"3456"
    os.close(fd)


def test_a_read_past_the_end_is_left_to_the_caller(tmp_path: Path) -> None:
    fd = cached_file(tmp_path / "file", b"0123456789")
    with pytest.raises(BlockingIOError):
        read_cached(fd, 11, 0)
    os.close(fd)


def test_pages_that_are_not_cached_are_left_to_the_caller(tmp_path: Path) -> None:
    fd = cached_file(tmp_path / "file", bytes(1 << 20))
    os.fsync(fd)
    deadline = time.monotonic() + 10
    with pytest.raises(BlockingIOError):
        # The kernel does not drop pages that it uses at the moment.
        while time.monotonic() < deadline:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            read_cached(fd, 512, 512 << 10)
    os.close(fd)


def test_other_errors_are_raised() -> None:
    reading, writing = os.pipe()
    with pytest.raises(OSError, match=os.strerror(errno.ESPIPE)):
        read_cached(reading, 512, 0)
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("is_cached", [True, False])
async def test_a_format_is_found_with_and_without_the_page_cache(tmp_path: Path, is_cached: bool) -> None:
    path = make_qcow2(tmp_path / "image")
    backing = open_disk(str(path), read_only=True)
    if is_cached:
        path.read_bytes()
    else:
        os.fsync(backing.fd)
        os.posix_fadvise(backing.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert await asyncio.wait_for(images.choose_format(backing, "qcow2", what="image"), 10) == "qcow2"
    backing.close()

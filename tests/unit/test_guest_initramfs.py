# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the writer of initramfs archives, with a reader for the same format."""

import io
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import vmspawn.guest
from vmspawn.guest.initramfs import Initramfs


class Entry(NamedTuple):
    path: str
    mode: int
    content: bytes
    device: tuple[int, int]


def written(write: Callable[[Initramfs], None]) -> bytes:
    file = io.BytesIO()
    archive = Initramfs(file)
    write(archive)
    archive.close()
    return file.getvalue()


def entries(data: bytes) -> list[Entry]:
    """Read an archive in the way that the kernel does."""
    found: list[Entry] = []
    while True:
        assert data[:6] == b"070701"
        fields = [int(data[start : start + 8], 16) for start in range(6, 110, 8)]
        name_end = 110 + fields[11]
        start = (name_end + 3) & ~3
        path = data[110 : name_end - 1].decode()
        if path == "TRAILER!!!":
            return found
        found.append(Entry(path, fields[1], data[start : start + fields[6]], (fields[9], fields[10])))
        data = data[(start + fields[6] + 3) & ~3 :]


def write_one_of_each(archive: Initramfs) -> None:
    archive.add_directory("proc")
    archive.add_file("etc/motd", b"hello")
    archive.add_file("bin/sh", b"#!", executable=True)
    archive.add_link("bin/ash", "sh")
    archive.add_character_device("dev/console", 5, 1)


def test_writes_all_kinds_of_files() -> None:
    assert [entry for entry in entries(written(write_one_of_each)) if not stat.S_ISDIR(entry.mode)] == [
        Entry("etc/motd", stat.S_IFREG | 0o644, b"hello", (0, 0)),
        Entry("bin/sh", stat.S_IFREG | 0o755, b"#!", (0, 0)),
        Entry("bin/ash", stat.S_IFLNK | 0o777, b"sh", (0, 0)),
        Entry("dev/console", stat.S_IFCHR | 0o600, b"", (5, 1)),
    ]


def test_a_directory_comes_once_and_before_its_files() -> None:
    def write(archive: Initramfs) -> None:
        archive.add_file("lib/modules/one", b"")
        archive.add_directory("lib")
        archive.add_file("lib/modules/two", b"")

    assert [entry.path for entry in entries(written(write))] == [
        "lib",
        "lib/modules",
        "lib/modules/one",
        "lib/modules/two",
    ]


@pytest.mark.parametrize("length", range(9))
def test_pads_names_and_contents_of_all_lengths(length: int) -> None:
    name, content = "n" * (length + 1), b"c" * length
    data = written(lambda archive: archive.add_file(name, content))
    assert entries(data) == [Entry(name, stat.S_IFREG | 0o644, content, (0, 0))]
    assert len(data) % 4 == 0


def test_the_same_input_makes_the_same_bytes() -> None:
    assert written(write_one_of_each) == written(write_one_of_each)


@pytest.mark.skipif(not shutil.which("cpio"), reason="there is no cpio")
def test_cpio_unpacks_an_archive(tmp_path: Path) -> None:
    def write(archive: Initramfs) -> None:
        archive.add_file("etc/motd", b"hello")
        archive.add_link("etc/issue", "motd")

    subprocess.run(["cpio", "--quiet", "-i"], input=written(write), cwd=tmp_path, check=True)
    assert (tmp_path / "etc/issue").read_text() == "hello"


def test_the_guests_init_is_a_shell_script() -> None:
    init = Path(vmspawn.guest.__file__).with_name("rootfs") / "init"
    assert subprocess.run(["sh", "-n", str(init)], stderr=subprocess.PIPE, check=False).stderr == b""

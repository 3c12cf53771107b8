# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests reading the kernel's modules and listing them for modprobe, with files that the tests make."""

import gzip
import lzma
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vmspawn.errors import GuestError
from vmspawn.guest.modules import Modules, modinfo, modules_alias, modules_dep


def elf_module(*information: str) -> bytes:
    """Return an object file with a section of names and, after it, `.modinfo`."""
    names = b"\0.shstrtab\0.modinfo\0"
    modinfo_section = b"".join(entry.encode() + b"\0" for entry in information)
    table = 64 + len(names) + len(modinfo_section)
    header = struct.pack("<16s2HI3QI6H", b"\x7fELF\x02\x01\x01", 1, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, 3, 1)
    sections = [(0, 0, 0), (1, 64, len(names)), (11, 64 + len(names), len(modinfo_section))]
    headers = [struct.pack("<2I4Q2I2Q", name, 1, 0, 0, start, size, 0, 0, 1, 0) for name, start, size in sections]
    return header + names + modinfo_section + b"".join(headers)


def make_modules(directory: Path, depends: dict[str, str], builtin: tuple[str, ...] = ()) -> Modules:
    (directory / "kernel/drivers").mkdir(parents=True)
    for name, others in depends.items():
        (directory / f"kernel/drivers/{name}.ko").write_bytes(elf_module(f"depends={others}", f"alias=of:{name}"))
    (directory / "modules.builtin").write_text("".join(f"kernel/fs/{name}.ko\n" for name in builtin))
    return Modules(directory)


def test_reads_a_modules_information() -> None:
    content = elf_module("license=GPL", "alias=pci:a", "alias=pci:b", "depends=", "no equals sign")
    assert modinfo(content) == {"license": ["GPL"], "alias": ["pci:a", "pci:b"], "depends": [""]}


@pytest.mark.parametrize("content", [b"", b"\x7fELF\x01\x01" + bytes(100), b"#!/bin/sh\n"])
def test_refuses_files_that_are_not_modules(content: bytes) -> None:
    with pytest.raises(GuestError, match="not a 64-bit"):
        modinfo(content)


def test_loads_a_modules_dependencies_before_it(tmp_path: Path) -> None:
    modules = make_modules(tmp_path, {"top": "left,right", "left": "base", "right": "base", "base": "", "other": ""})
    assert list(modules.load(["top"])) == ["base", "left", "right", "top"]


def test_does_not_load_built_in_or_missing_modules(tmp_path: Path) -> None:
    modules = make_modules(tmp_path, {"virtio-blk": "virtio"}, builtin=("virtio", "nvme-core"))
    assert list(modules.load(["nvme_core", "nonesuch", "virtio_blk"])) == ["virtio_blk"]
    assert modules.missing(["nvme_core", "nonesuch", "virtio_blk"]) == ["nonesuch"]


def test_modules_dep_lists_the_first_dependency_last(tmp_path: Path) -> None:
    modules = make_modules(tmp_path, {"top": "middle", "middle": "base", "base": ""}).load(["top"])
    assert modules_dep(modules) == "base.ko:\nmiddle.ko: base.ko\ntop.ko: middle.ko base.ko\n"


def test_modules_alias_leads_from_alias_to_name(tmp_path: Path) -> None:
    modules = make_modules(tmp_path, {"virtio-blk": ""}).load(["virtio_blk"])
    assert modules_alias(modules) == "alias of:virtio-blk virtio_blk\n"


def zstd(content: bytes) -> bytes:
    return subprocess.run(["zstd", "-qc"], input=content, capture_output=True, check=True).stdout


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".xz", lzma.compress),
        (".gz", gzip.compress),
        pytest.param(".zst", zstd, marks=pytest.mark.skipif(not shutil.which("zstd"), reason="there is no zstd")),
    ],
)
def test_decompresses_modules(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    content = elf_module("depends=")
    (tmp_path / "kernel").mkdir()
    (tmp_path / f"kernel/small.ko{suffix}").write_bytes(compress(content))
    assert Modules(tmp_path).load(["small"])["small"].content == content


def test_hints_at_the_package_if_zstd_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernel").mkdir()
    (tmp_path / "kernel/small.ko.zst").write_bytes(b"")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GuestError) as caught:
        Modules(tmp_path).load(["small"])
    assert caught.value.hint == "install the package zstd"

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests finding the built-in guest in the cache, and building it there."""

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.test_guest_initramfs import entries
from tests.unit.test_guest_modules import make_modules
from vmspawn.agent import build as agent_build
from vmspawn.errors import GuestError
from vmspawn.guest import build, builtin, busybox, kernel
from vmspawn.guest.kernel import Kernel

BUS_MODULES = ("virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod", "sr_mod", "isofs", "evdev", "button")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VMSPAWN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache/guest"


@pytest.fixture
def ingredients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Make a build use these files instead of a real kernel and busybox."""
    image = tmp_path / "vmlinuz"
    image.write_bytes(b"kernel")
    found = Kernel(image, make_modules(tmp_path / "modules/1.0", {"virtio-blk": "virtio", "virtio": "", "ext4": ""}))
    monkeypatch.setattr(build, "find_kernel", lambda *arguments: found)
    monkeypatch.setattr(build, "find_busybox", lambda *arguments: b"busybox")
    return found


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.parametrize(
    ("environment", "directory"),
    [
        ({"VMSPAWN_CACHE_DIR": "/c", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/c/guest"),
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/vmspawn/guest"),
        ({"VMSPAWN_CACHE_DIR": "", "XDG_CACHE_HOME": "", "HOME": "/tmp"}, "/tmp/.cache/vmspawn/guest"),
    ],
)
def test_the_environment_determines_the_cache_directory(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], directory: str
) -> None:
    for name in ("VMSPAWN_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert builtin.cache_directory() == directory


def test_an_empty_cache_has_no_guest() -> None:
    assert builtin.find() is None


def test_the_module_that_finds_the_guest_loads_few_others() -> None:
    script = (
        "import __future__, sys, typing; import vmspawn; old = {*sys.modules}; "
        "import vmspawn.guest.builtin; print(*{*sys.modules} - old)"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert set(done.stdout.split()) == {
        *("vmspawn.cache", "vmspawn.fingerprint", "vmspawn.user_directories", "vmspawn.guest", "vmspawn.guest.builtin")
    }


def test_all_files_of_the_guest_are_listed() -> None:
    found = {str(path.relative_to(builtin.ROOTFS)) for path in Path(builtin.ROOTFS).rglob("*") if path.is_file()}
    assert found == set(builtin.FILES)


def test_a_changed_script_is_another_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = builtin.fingerprint()
    for name in builtin.FILES:
        copy = tmp_path / "rootfs" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(Path(builtin.ROOTFS, name).read_bytes())
    monkeypatch.setattr(builtin, "ROOTFS", str(tmp_path / "rootfs"))
    assert builtin.fingerprint() == before
    with open(tmp_path / "rootfs/init", "a") as file:
        file.write("\n")
    assert builtin.fingerprint() != before


@pytest.mark.parametrize("changed", agent_build._INPUTS)
def test_another_agent_is_another_guest(changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = builtin.fingerprint()
    copy = Path(shutil.copytree(builtin._AGENT, tmp_path / "agent"))
    monkeypatch.setattr(builtin, "_AGENT", str(copy))
    assert builtin.fingerprint() == before
    with open(copy / changed, "a") as file:
        file.write("\n")
    assert builtin.fingerprint() != before


@pytest.mark.usefixtures("ingredients")
def test_a_built_guest_is_found(cache: Path) -> None:
    phrases: list[str] = []
    guest = build.build(on_progress=phrases.append)
    assert guest == builtin.find()
    assert Path(guest.kernel).read_bytes() == b"kernel"
    assert Path(guest.kernel).parent.parent == cache
    assert "quiet" in guest.arguments
    assert phrases == ["Writing the initramfs"]


@pytest.mark.usefixtures("ingredients")
def test_the_initramfs_has_scripts_busybox_and_modules() -> None:
    found = {entry.path: entry for entry in entries(Path(build.build().initrd).read_bytes())}
    assert found["init"].mode & 0o111
    assert found["bin/busybox"].content == b"busybox"
    assert found["etc/modules"].content == b"virtio_blk\n"
    assert found["lib/modules/1.0/modules.dep"].content == b"virtio.ko:\nvirtio_blk.ko: virtio.ko\next4.ko:\n"
    assert set(builtin.FILES) <= set(found)


@pytest.mark.usefixtures("ingredients")
def test_a_build_removes_the_guests_of_other_versions_after_a_month_without_use(cache: Path) -> None:
    for name in ("x86_64-old", "x86_64-used", "aarch64-old", ".new-fresh", ".new-stale"):
        (cache / name).mkdir(parents=True)
    for name in ("x86_64-old", "aarch64-old", ".new-stale"):
        os.utime(cache / name, (0, 0))
    build.build()
    # A snapshot of a running machine needs the files of the guest that the machine was started with.
    assert names_in(cache) == {f"x86_64-{builtin.fingerprint()}", "x86_64-used", "aarch64-old", ".new-fresh"}


@pytest.mark.usefixtures("ingredients")
def test_each_use_of_a_guest_is_recorded() -> None:
    directory = os.path.dirname(build.build().kernel)
    os.utime(directory, (0, 0))
    assert builtin.find() is not None
    assert os.stat(directory).st_mtime > 0


@pytest.mark.usefixtures("ingredients")
def test_a_guest_that_lost_a_file_is_built_again() -> None:
    guest = build.build()
    os.unlink(guest.initrd)
    assert builtin.find() is None
    assert build.build() == builtin.find() == guest


def test_of_two_builds_at_once_the_first_stays(
    ingredients: Kernel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_kernel_after_another_build(*arguments: object) -> Kernel:
        monkeypatch.setattr(build, "find_kernel", lambda *arguments: ingredients)
        other = build.build()
        Path(other.kernel).write_bytes(b"other")
        return ingredients

    monkeypatch.setattr(build, "find_kernel", find_kernel_after_another_build)
    assert Path(build.build().kernel).read_bytes() == b"other"
    assert names_in(cache) == {f"x86_64-{builtin.fingerprint()}"}


def test_a_failed_build_leaves_nothing(ingredients: Kernel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> bytes:
        raise GuestError("no busybox")

    monkeypatch.setattr(build, "find_busybox", fail)
    with pytest.raises(GuestError, match="no busybox"):
        build.build()
    assert names_in(cache) == set()


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(GuestError, match="no built-in guest for riscv64") as caught:
        build.build("riscv64")
    assert caught.value.hint == "there is one for x86_64 and aarch64"


def test_a_cache_that_cannot_be_written_is_reported(cache: Path) -> None:
    cache.parent.write_text("a file in its place")
    with pytest.raises(GuestError, match=r"cannot build the guest in .*: Not a directory") as caught:
        build.build()
    assert "VMSPAWN_CACHE_DIR" in caught.value.hint


def make_root(root: Path, base: str = "lib/modules", builtin_modules: tuple[str, ...] = ("nvme",)) -> Path:
    make_modules(root / base / "1.0", dict.fromkeys(BUS_MODULES, ""), builtin_modules)
    (root / "boot").mkdir()
    (root / "boot/vmlinuz-1.0").write_bytes(b"kernel")
    return root


@pytest.mark.parametrize("base", ["lib/modules", "usr/lib/modules"])
def test_finds_a_kernel_where_distributions_install_it(tmp_path: Path, base: str) -> None:
    root = make_root(tmp_path, base)
    assert kernel.kernel_at(root, "1.0", "x86_64").image == root / "boot/vmlinuz-1.0"
    (root / "boot/vmlinuz-1.0").rename(root / base / "1.0/vmlinuz")
    assert kernel.kernel_at(root, "1.0", "x86_64").image == root / base / "1.0/vmlinuz"


def test_reports_the_reason_why_a_kernel_is_unusable(tmp_path: Path) -> None:
    root = make_root(tmp_path, builtin_modules=())
    with pytest.raises(GuestError, match=r"the kernel 1\.0 lacks nvme$"):
        kernel.kernel_at(root, "1.0", "x86_64")
    (root / "boot/vmlinuz-1.0").unlink()
    with pytest.raises(GuestError, match=r"boot/vmlinuz-1\.0 does not exist"):
        kernel.kernel_at(root, "1.0", "x86_64")


def elf_program(machine: int, segment: int, text: bytes) -> bytes:
    """Return a program with one segment of the given type."""
    header = struct.pack("<16s2HI3QI6H", b"\x7fELF\x02\x01\x01", 2, machine, 1, 0, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    return header + struct.pack("<I52x", segment) + text


GOOD = b"BusyBox v1.35.0 (Debian)\0mdev\0"


@pytest.mark.parametrize(
    ("content", "usable"),
    [
        (elf_program(62, 1, GOOD), True),
        (elf_program(183, 1, GOOD), False),
        (elf_program(62, 3, GOOD), False),
        (elf_program(62, 1, b"BusyBox v1.30.1\0mdev\0"), False),
        (elf_program(62, 1, b"BusyBox v1.36.0\0"), False),
        (b"#!/bin/sh\n" + GOOD, False),
        (b"", False),
    ],
    ids=["good", "another-architecture", "dynamic", "too-old", "no-mdev", "a-script", "nothing"],
)
def test_takes_only_a_busybox_that_will_run(content: bytes, usable: bool) -> None:
    assert busybox.is_usable(content, "x86_64") == usable

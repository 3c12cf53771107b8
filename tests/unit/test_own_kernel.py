# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the preparation of a user's kernel: its configuration, its modules, and refusals before the start."""

from __future__ import annotations

import gzip
import io
import lzma
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_guest_initramfs import entries
from tests.unit.test_guest_modules import elf_module, make_modules
from vmspawn.boot.config import MachineConfig
from vmspawn.boot.config import check_config as check
from vmspawn.errors import GuestError, StartError, UsageError
from vmspawn.guest import own_kernel
from vmspawn.images import kernel_config
from vmspawn.network.forward import Forward

CONFIG = b'CONFIG_PCI=y\nCONFIG_VIRTIO_FS=m\n# CONFIG_NET is not set\nCONFIG_NAME="x=y"\n'
FOUND = {"CONFIG_PCI": "y", "CONFIG_VIRTIO_FS": "m", "CONFIG_NAME": '"x=y"'}

WHOLE = dict.fromkeys(own_kernel._NEEDED, "y")
WHOLE |= {"CONFIG_VIRTIO_PCI": "y", "CONFIG_VIRTIO_CONSOLE": "y"}


def kernel(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def test_a_kernels_configuration_is_found_in_its_build_tree(tmp_path: Path) -> None:
    image = kernel(tmp_path / "arch/x86/boot/bzImage", b"image")
    assert kernel_config.read(image) == {}
    (tmp_path / ".config").write_bytes(CONFIG)
    assert kernel_config.read(image) == FOUND


def test_a_kernels_configuration_is_found_beside_its_modules(tmp_path: Path) -> None:
    image = kernel(tmp_path / "vmlinuz", b"image")
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "config").write_bytes(CONFIG)
    assert kernel_config.read(image, str(tmp_path / "modules")) == FOUND


@pytest.mark.parametrize("compress", [bytes, gzip.compress, lzma.compress], ids=["plain", "gzip", "xz"])
def test_a_kernels_configuration_is_found_in_the_kernel_itself(tmp_path: Path, compress: object) -> None:
    assert callable(compress)
    inside = bytes(5000) + b"IKCFG_ST" + gzip.compress(CONFIG) + b"IKCFG_ED" + bytes(5000)
    image = b"setup code \x1f\x8b\x08 that looks like gzip" + compress(inside) + b"what follows"
    assert kernel_config.read(kernel(tmp_path / "vmlinuz", image)) == FOUND


@pytest.mark.parametrize(
    "damaged",
    [
        gzip.compress(CONFIG * 1000)[:-20],
        gzip.compress(CONFIG)[:12] + b"\xff" * 20,
        gzip.compress(CONFIG)[:-8] + bytes(8),
        gzip.compress(CONFIG + bytes(kernel_config._CONFIG_SIZE_MAX)),
    ],
    ids=["truncated", "garbage", "checksum", "bomb"],
)
def test_a_configuration_that_cannot_be_unpacked_is_passed_over(tmp_path: Path, damaged: bytes) -> None:
    image = kernel(tmp_path / "vmlinuz", b"image")
    for name in ("config", "build/.config"):
        kernel(tmp_path / "modules" / name, damaged)
    assert kernel_config.read(image, str(tmp_path / "modules")) == {}
    (tmp_path / "modules/build/.config").write_bytes(CONFIG)
    assert kernel_config.read(image, str(tmp_path / "modules")) == FOUND


@given(st.binary(max_size=400), st.sampled_from([b"", b"IKCFG_ST", b"\x1f\x8b\x08", b"\xfd7zXZ\0", b"BZh9"]))
def test_any_file_is_read_without_an_error(data: bytes, magic: bytes) -> None:
    list(kernel_config._unpacked(magic + data))
    assert kernel_config._parse(kernel_config._embedded(magic + data)) == {}


def test_an_error_names_the_options_that_a_kernel_lacks() -> None:
    own_kernel.check("k", WHOLE, None, commands=True, userland="")
    own_kernel.check("k", {}, None, commands=True, userland="ro")
    lacking = {**WHOLE, "CONFIG_TMPFS": "m"}
    del lacking["CONFIG_VIRTIO_CONSOLE"]
    with pytest.raises(StartError, match="k lacks CONFIG_TMPFS, CONFIG_VIRTIO_CONSOLE"):
        own_kernel.check("k", lacking, None, commands=True, userland="")
    own_kernel.check("k", {**lacking, "CONFIG_TMPFS": "y"}, None, commands=False, userland="")
    with pytest.raises(StartError, match="lacks CONFIG_FUSE_FS, CONFIG_VIRTIO_FS, CONFIG_OVERLAY_FS"):
        own_kernel.check("k", WHOLE, None, commands=True, userland="ro")
    with pytest.raises(StartError, match=r"lacks CONFIG_FUSE_FS, CONFIG_VIRTIO_FS\n"):
        own_kernel.check("k", WHOLE, None, commands=True, userland="rw")


def test_missing_modules_are_refused(tmp_path: Path) -> None:
    options = {**WHOLE, "CONFIG_VIRTIO_PCI": "m", "CONFIG_VIRTIO_CONSOLE": "m"}
    with pytest.raises(GuestError, match="CONFIG_VIRTIO_PCI, CONFIG_VIRTIO_CONSOLE as modules") as caught:
        own_kernel.check("k", options, None, commands=True, userland="")
    assert "modules=" in caught.value.hint
    modules = make_modules(tmp_path / "1.0", {"virtio-pci": "virtio", "virtio": "", "virtio_console": ""})
    own_kernel.check("k", options, modules, commands=True, userland="")
    found = {each.path for each in entries(own_kernel.initrd(modules, "1.0"))}
    assert {"lib/modules/1.0/virtio_pci.ko", "lib/modules/1.0/virtio.ko", "etc/modules"} <= found


def test_modules_of_another_kernel_are_refused(tmp_path: Path) -> None:
    modules = make_modules(tmp_path / "1.0", {"virtio_pci": ""})
    (tmp_path / "1.0/kernel/drivers/virtio_pci.ko").write_bytes(elf_module("depends=", "vermagic=1.0 SMP preempt "))
    assert own_kernel.initrd(modules, "1.0") == own_kernel.initrd(modules, "")
    with pytest.raises(GuestError, match=r"module virtio_pci was built for the kernel 1\.0, and the kernel is 1\.1"):
        own_kernel.initrd(modules, "1.1")


def test_modules_are_found_in_a_root_a_modules_directory_and_a_build_tree(tmp_path: Path) -> None:
    make_modules(tmp_path / "lib/modules/6.1", {"a": ""})
    for path in (tmp_path, tmp_path / "lib/modules/6.1"):
        found = own_kernel.find_modules(str(path), "6.1")
        assert found is not None
        assert (found.version, found.missing(["a"])) == ("6.1", [])
    tree = tmp_path / "linux"
    (tree / "drivers").mkdir(parents=True)
    (tree / "Kconfig").touch()
    (tree / "modules.order").write_text("drivers/a.o\n")
    (tmp_path / "lib/modules/6.1/kernel/drivers/a.ko").rename(tree / "drivers" / "a.ko")
    built = own_kernel.find_modules(str(tree), "6.2-rc1")
    assert built is not None
    assert (built.version, built.missing(["a"])) == ("6.2-rc1", [])
    assert own_kernel.find_modules(None, "no-such-version") is None
    for path in (tmp_path / "none", tmp_path / "linux" / "drivers"):
        with pytest.raises(StartError, match="modules="):
            own_kernel.find_modules(str(path), "6.1")


def test_an_initrd_without_modules_has_an_empty_list() -> None:
    listed = {each.path: each.content for each in entries(own_kernel.initrd(None, ""))}
    assert listed["etc/modules"] == b""


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"guest": "builtin", "linux": "k", "initrd": "i"}, "own initrd"),
        ({"guest": "builtin", "modules": "m"}, "modules="),
        ({"linux": "k", "modules": "m"}, "modules="),
        ({"directory": "/", "directory_rw": True}, "directory_rw="),
        ({"guest": "builtin", "directory_rw": True}, "directory_rw="),
        ({"guest": "builtin", "warm": True, "linux": "k"}, "linux="),
        ({"guest": "builtin", "warm": True, "directory": "/"}, "directory="),
        ({"guest": "builtin", "warm": True, "forwards": (Forward(22),)}, "forwards="),
        ({"image": "i", "directory": "/"}, "both name the guest's root"),
    ],
)
def test_contradictory_options_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        check(MachineConfig()._replace(**options))


def test_a_kernel_and_a_directory_can_be_combined_with_the_guest() -> None:
    config = check(MachineConfig(guest="builtin", linux="k", directory="/", directory_rw=True, modules="m"))
    assert config.is_userland
    assert not check(MachineConfig(directory="/")).is_userland
    assert io.BytesIO(own_kernel.initrd(None, "")).read(6) == b"070701"

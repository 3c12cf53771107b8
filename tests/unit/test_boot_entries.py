# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the choice of the kernel in a directory, and of the image for a machine's name."""

from pathlib import Path

import pytest

from tests.spawn_config import parse_config
from vmspawn.errors import StartError, UsageError
from vmspawn.images import named_images
from vmspawn.images.boot_entries import Entry, find


def touch(root: Path, *names: str) -> list[str]:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return [str(root / name) for name in names]


def entry(root: Path, name: str, *lines: str) -> None:
    touch(root, name)
    (root / name).write_text("\n".join(lines))


def test_the_newest_unified_image_comes_first(tmp_path: Path) -> None:
    touch(tmp_path, "efi/EFI/Linux/debian-6.9.efi", "boot/vmlinuz-7.0")
    (newest,) = touch(tmp_path, "boot/EFI/Linux/debian-6.12.efi")
    assert find(str(tmp_path)) == Entry(newest, ())


def test_an_entry_names_its_kernel_and_its_initrds(tmp_path: Path) -> None:
    kernel, first, second = touch(tmp_path, "boot/m/6.12/linux", "boot/m/6.12/initrd", "boot/m/ucode")
    entry(
        tmp_path,
        "boot/loader/entries/m-6.12.conf",
        "title x",
        "linux /m/6.12/linux",
        "initrd /m/ucode",
        "initrd m/6.12/initrd",
    )
    entry(tmp_path, "boot/loader/entries/m-6.13.conf", "linux /m/gone")
    entry(tmp_path, "boot/loader/entries/m-6.2.conf", "linux /m/6.12/linux")
    assert find(str(tmp_path)) == Entry(kernel, (second, first))


def test_distributions_kernels_are_found_without_an_entry(tmp_path: Path) -> None:
    kernel, initrd, *_ = touch(tmp_path, "boot/vmlinuz-6.12", "boot/initrd.img-6.12", "boot/vmlinuz-6.9")
    assert find(str(tmp_path)) == Entry(kernel, (initrd,))


def test_a_directory_without_a_kernel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="has no kernel") as caught:
        find(str(tmp_path))
    assert "name a kernel with linux=" in caught.value.hint


def test_a_name_alone_stands_for_an_image_or_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named_images, "places", lambda: [str(tmp_path / "first"), str(tmp_path / "second")])
    (image,) = touch(tmp_path, "second/a.raw")
    (tmp_path / "first" / "b").mkdir(parents=True)
    assert parse_config(["-M", "a"]).image == image
    config = parse_config(["-M", "b"])
    assert (config.directory, config.name) == (str(tmp_path / "first" / "b"), "b")
    with pytest.raises(UsageError, match="nothing to boot: no image is named c"):
        parse_config(["-M", "c"])

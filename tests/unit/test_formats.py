# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the detection of an image's format and of the other files that an image names."""

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import MIB
from tests.imagefiles import CONTAINERS, OTHERS, RAW, UNCHECKABLE, make
from tests.loop import Loop
from vmspawn.boot.config import MachineConfig
from vmspawn.boot.disks import open_boot_disks
from vmspawn.errors import BadConfig, ConfigNotSupported, StartError, SystemFailure
from vmspawn.hotplug.places import layout
from vmspawn.images import other_files as others
from vmspawn.images.other_files import OtherFile, other_files
from vmspawn.storage.backing import Backing, open_disk
from vmspawn.storage.formats import FORMATS, READ_ONLY_FORMATS, choose_format


@contextmanager
def backing_of(path: Path, *, read_only: bool = True) -> Iterator[Backing]:
    backing = open_disk(str(path), read_only=read_only)
    yield backing
    backing.close()


def named_by(path: Path, image_format: str) -> list[OtherFile]:
    data = path.read_bytes()
    return other_files(image_format, lambda offset, length: data[offset : offset + length])


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_format_is_specified_and_never_guessed(tmp_path: Path, image_format: str) -> None:
    with backing_of(make(tmp_path / "image", image_format)) as backing:
        assert choose_format(backing, image_format, what="image") == image_format
        if image_format == "raw":
            assert choose_format(backing, None, what="image") == "raw"
        else:
            with pytest.raises(BadConfig, match=f"looks like {image_format}, but no format was specified"):
                choose_format(backing, None, what="image")


@pytest.mark.parametrize("image_format", [each for each in FORMATS if each != "raw"])
def test_an_image_of_another_format_is_refused(tmp_path: Path, image_format: str) -> None:
    with (
        backing_of(make(tmp_path / "image", "raw")) as backing,
        pytest.raises(BadConfig, match=f"image is not in {image_format} format"),
    ):
        choose_format(backing, image_format, what="image")


@pytest.mark.parametrize("image_format", READ_ONLY_FORMATS)
def test_formats_that_are_only_read_are_not_written(tmp_path: Path, image_format: str) -> None:
    with (
        backing_of(make(tmp_path / "image", image_format), read_only=False) as backing,
        pytest.raises(ConfigNotSupported, match=f"{image_format} format are read-only") as caught,
    ):
        choose_format(backing, image_format, what="image")
    assert "read-only" in caught.value.hint


# Images that name other files.


@pytest.mark.parametrize(
    ("image_format", "maker", "expected"),
    [(name, *each) for name, cases in OTHERS.items() for each in cases],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_images_that_name_other_files_are_refused(
    tmp_path: Path, image_format: str, maker: Callable[[Path], Path], expected: list[OtherFile]
) -> None:
    """QEMU would open them by path, or ignore them."""
    path = maker(tmp_path)
    assert named_by(path, image_format) == expected
    with backing_of(path) as backing, pytest.raises(BadConfig, match=r"^image (has|names) ") as caught:
        choose_format(backing, image_format, what="image")
    assert expected[0].name in str(caught.value)
    assert caught.value.hint


def test_every_format_is_checked_for_other_files() -> None:
    assert set(FORMATS) == set(others.READERS) == set(OTHERS)


@pytest.mark.parametrize(
    ("image_format", "options"),
    [
        ("qcow2", ("-o", "compat=0.10")),
        ("qcow2", ("-o", "compat=1.1,extended_l2=on")),
        ("vmdk", ("-o", "subformat=streamOptimized")),
        ("vmdk", ("-o", "subformat=monolithicSparse")),
        ("vdi", ("-o", "static=on")),
        ("vhdx", ("-o", "subformat=fixed")),
    ],
)
def test_images_that_name_no_other_file_are_accepted(
    tmp_path: Path, image_format: str, options: tuple[str, ...]
) -> None:
    path = make(tmp_path / "image", image_format, *options)
    assert named_by(path, image_format) == []
    with backing_of(path) as backing:
        assert choose_format(backing, image_format, what="image") == image_format


def test_a_renamed_image_names_no_other_file(tmp_path: Path) -> None:
    """The descriptor in a VMDK names the VMDK itself as its extent, by the name at its creation."""
    assert named_by(make(tmp_path / "image", "vmdk").rename(tmp_path / "other"), "vmdk") == []


@pytest.mark.parametrize("maker", UNCHECKABLE)
def test_an_image_that_cannot_be_checked_is_refused(tmp_path: Path, maker: Callable[[Path], Path]) -> None:
    with (
        backing_of(maker(tmp_path)) as backing,
        pytest.raises(BadConfig, match="cannot tell whether image needs other files: it") as caught,
    ):
        choose_format(backing, maker.__name__.partition("_")[0], what="image")
    assert caught.value.hint


def test_a_name_in_an_image_does_nothing_to_a_terminal(tmp_path: Path) -> None:
    make(tmp_path / "base", "qcow2")
    path = make(tmp_path / "image", "qcow2", "-b", "base", "-F", "qcow2")
    path.write_bytes(path.read_bytes().replace(b"base", b"\x1b[m\n"))
    with backing_of(path) as backing, pytest.raises(BadConfig, match=r"has a backing file \(\\x1b\[m\\n\)"):
        choose_format(backing, "qcow2", what="image")


# Images without a specified format.


def test_the_hint_for_the_image_of_a_machine_names_its_option(tmp_path: Path) -> None:
    image = CONTAINERS["qcow2"](tmp_path)
    with pytest.raises(StartError) as caught:
        open_boot_disks(MachineConfig(image=str(image)), layout("q35", None), str(tmp_path))
    assert caught.value.hint.startswith("use image_format=qcow2, or raw")


@pytest.mark.parametrize("content", CONTAINERS)
def test_an_image_without_a_specified_format_is_refused(tmp_path: Path, content: str) -> None:
    image_format = content.partition(" ")[0]
    with backing_of(CONTAINERS[content](tmp_path)) as backing:
        with pytest.raises(BadConfig, match=f"image looks like {image_format}, but no format was specified") as caught:
            choose_format(backing, None, what="image")
        # The hint names both formats that the user may mean.
        assert caught.value.hint.startswith("specify format ")
        assert "raw" in caught.value.hint
        assert choose_format(backing, "raw", what="image") == "raw"
        other = "vdi" if image_format == "qcow2" else "qcow2"
        with pytest.raises(BadConfig, match=rf"not in {other} format, but looks like {image_format}(\n|$)"):
            choose_format(backing, other, what="image")


@pytest.mark.parametrize("image_format", ["qcow", "qed", "vpc", "parallels"])
def test_the_hint_for_a_format_that_a_disk_cannot_have_converts_the_image(tmp_path: Path, image_format: str) -> None:
    with backing_of(make(tmp_path / "image", image_format)) as backing:
        with pytest.raises(BadConfig) as caught:
            choose_format(backing, None, what="image")
        command = caught.value.hint.partition("qemu-img ")[2].split()
    words = ["image" if word == "IMAGE" else word for word in command]
    subprocess.run(["qemu-img", *words], check=True, cwd=tmp_path)
    assert subprocess.check_output(["qemu-img", "info", "-f", "qcow2", "FLAT"], cwd=tmp_path, text=True)


# Raw disks.


@pytest.mark.parametrize("content", RAW)
def test_a_raw_disk_is_not_taken_for_another_format(tmp_path: Path, content: str) -> None:
    (tmp_path / "image").touch()
    with backing_of(RAW[content](tmp_path)) as backing:
        assert choose_format(backing, None, what="image") == "raw"


def test_an_image_that_cannot_be_read_is_refused_with_the_reason(tmp_path: Path) -> None:
    """The image is a loop device whose file was truncated."""
    loop = Loop(tmp_path / "device", 4 * MIB)
    os.truncate(tmp_path / "device", 0)
    try:
        with backing_of(Path(loop.path)) as backing, pytest.raises(SystemFailure, match="cannot read image") as caught:
            choose_format(backing, None, what="image")
        assert caught.value.errno == errno.EIO
    finally:
        loop.close()

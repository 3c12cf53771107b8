# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an image's header says, and what of it is refused."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import MIB
from vmspawn.errors import BadConfig, ConfigNotSupported
from vmspawn.storage.backing import Backing, open_disk
from vmspawn.storage.formats import FORMATS, READ_ONLY_FORMATS, choose_format


@contextmanager
def backing_of(path: Path, *, read_only: bool = True) -> Iterator[Backing]:
    backing = open_disk(str(path), read_only=read_only)
    yield backing
    backing.close()


def make(path: Path, image_format: str, *options: str) -> Path:
    """Make an image with qemu-img, which knows the formats best."""
    command = ["qemu-img", "create", "-q", "-f", image_format, *options, str(path), str(4 * MIB)]
    subprocess.run(command, check=True)
    return path


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_format_is_taken_when_it_is_said_and_never_guessed(tmp_path: Path, image_format: str) -> None:
    with backing_of(make(tmp_path / "image", image_format)) as backing:
        assert choose_format(backing, image_format, what="image") == image_format
        if image_format == "raw":
            assert choose_format(backing, None, what="image") == "raw"
        else:
            with pytest.raises(BadConfig, match=f"looks like {image_format}, and no format was given"):
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
        pytest.raises(ConfigNotSupported, match=f"{image_format} format are only read") as caught,
    ):
        choose_format(backing, image_format, what="image")
    assert "read-only" in caught.value.hint


def test_images_that_name_other_files_are_refused(tmp_path: Path) -> None:
    """QEMU would open them by path: a backing file, a data file, extents."""
    base = make(tmp_path / "base", "qcow2")
    overlay = tmp_path / "overlay"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "qcow2", str(overlay)]
    subprocess.run(command, check=True)
    with backing_of(overlay) as backing, pytest.raises(BadConfig, match="has a backing file"):
        choose_format(backing, "qcow2", what="overlay")
    apart = make(tmp_path / "apart", "qcow2", "-o", f"data_file={tmp_path / 'data'}")
    with backing_of(apart) as backing, pytest.raises(BadConfig, match="has its data in another file"):
        choose_format(backing, "qcow2", what="apart")
    flat = make(tmp_path / "flat", "vmdk", "-o", "subformat=monolithicFlat")
    with backing_of(flat) as backing, pytest.raises(BadConfig, match="is not in vmdk format"):
        choose_format(backing, "vmdk", what="flat")
    # A sparse extent whose capacity is zero has a description of other extents in its place.
    with open(make(tmp_path / "sparse", "vmdk"), "r+b") as file:
        file.seek(12)
        file.write(bytes(8))
    with backing_of(tmp_path / "sparse") as backing, pytest.raises(BadConfig, match="names other files as its extents"):
        choose_format(backing, "vmdk", what="sparse")


def test_a_short_file_is_raw(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"QF")
    with backing_of(tmp_path / "short") as backing:
        assert choose_format(backing, None, what="short") == "raw"
        assert os.pread(backing.fd, 2, 0) == b"QF"

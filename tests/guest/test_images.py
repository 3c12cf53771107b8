# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that a booted guest does not change an ephemeral image, and sees the new size of a grown image."""

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from tests.commands import vmspawn
from tests.conftest import MIB, make_qcow2, make_raw
from tests.imagefiles import make
from tests.loop import Loop
from tests.machines import Machine, fresh_name
from tests.shell import Shell
from vmspawn.errors import UsageError


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def machine(qemu: str, image: Path, **options: Any) -> Machine:
    defaults = {"guest": "builtin", "image": str(image), "name": fresh_name(), "console": "headless"}
    return Machine(**{**defaults, "qemu": qemu, **options})


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_an_ephemeral_image_can_be_written_and_its_file_is_unchanged(
    qemu: str, tmp_path: Path, image_format: str
) -> None:
    image = (make_raw if image_format == "raw" else make_qcow2)(tmp_path / "image", 16 * MIB)
    if image_format == "raw":
        with image.open("r+b") as file:
            file.write(b"as it was")
    before = checksum(image)
    async with machine(qemu, image, image_format=image_format, ephemeral=True, grow_image=24 * MIB + 1) as running:
        shell = await Shell.open(running)
        assert await shell.run("cat /sys/block/vda/size") == str((24 * MIB + 4096) // 512)
        if image_format == "raw":
            assert await shell.run("head -c 9 /dev/vda") == "as it was"
        await shell.run("printf changed | dd of=/dev/vda conv=notrunc,fsync bs=7 && echo 3 >/proc/sys/vm/drop_caches")
        assert await shell.run("head -c 7 /dev/vda") == "changed"
        shell.close()
    assert checksum(image) == before
    assert os.listdir(tmp_path) == ["image"]


async def test_an_ephemeral_image_may_be_read_only(qemu: str, tmp_path: Path) -> None:
    image = make_raw(tmp_path / "image", MIB)
    image.chmod(0o400)
    async with machine(qemu, image, ephemeral=True) as running:
        assert running.running


@pytest.mark.parametrize(("size", "after"), [(3 * MIB + 1, 3 * MIB + 4096), (MIB, 2 * MIB)])
async def test_a_raw_image_grows_but_never_shrinks(qemu: str, tmp_path: Path, size: int, after: int) -> None:
    image = make_raw(tmp_path / "image", 2 * MIB)
    async with machine(qemu, image, grow_image=size) as running:
        disks = await running.monitor.execute("query-block")
        assert [each["inserted"]["image"]["virtual-size"] for each in disks if "inserted" in each] == [after]
    assert image.stat().st_size == after


@pytest.mark.parametrize(
    ("image_format", "hint"),
    [
        ("qcow2", "qemu-img resize"),
        ("vmdk", "qemu-img convert"),
        ("vdi", "qemu-img convert"),
        ("vhdx", "qemu-img convert"),
    ],
)
def test_an_image_in_another_format_is_not_grown_and_the_hint_explains_how(
    qemu: str, tmp_path: Path, image_format: str, hint: str
) -> None:
    image = make(tmp_path / "image", image_format)
    done = vmspawn(f"--qemu={qemu}", f"--image={image}", f"--image-format={image_format}", "--grow-image=8M")
    assert done.returncode == 2
    assert f"does not grow a {image_format} image" in done.stderr
    assert hint in done.stderr


async def test_a_block_device_is_not_grown(qemu: str, tmp_path: Path) -> None:
    loop = Loop(tmp_path / "device", 2 * MIB)
    try:
        with pytest.raises(UsageError, match=f"does not grow a block device.* has {2 * MIB} bytes"):
            async with machine(qemu, Path(loop.path), grow_image=2 * MIB + 1):
                pass
        async with machine(qemu, Path(loop.path), grow_image=2 * MIB) as running:
            assert running.running
    finally:
        loop.close()


async def test_an_ephemeral_image_has_the_last_bytes_of_a_file_that_ends_within_a_sector(
    qemu: str, tmp_path: Path
) -> None:
    image = make_raw(tmp_path / "image", MIB)
    with image.open("ab") as file:
        file.write(b"the end")
    async with machine(qemu, image, ephemeral=True) as running:
        shell = await Shell.open(running)
        assert await shell.run(f"dd if=/dev/vda bs={MIB} skip=1 2>/dev/null | head -c 7") == "the end"
        shell.close()
    assert image.stat().st_size == MIB + 7


def test_ephemeral_is_refused_with_extra_drives_or_without_an_image(tmp_path: Path) -> None:
    extra = vmspawn(f"--image={tmp_path}/a", "--ephemeral", f"--extra-drive={tmp_path}/b")
    assert extra.returncode == 2
    assert "--ephemeral does not work with --extra-drive=" in extra.stderr
    with pytest.raises(UsageError, match="ephemeral=True works only with image="):
        Machine(guest="builtin", ephemeral=True)


async def test_an_overlay_leaves_no_descriptor_behind(qemu: str, tmp_path: Path) -> None:
    image = make_raw(tmp_path / "image", MIB)
    before = len(os.listdir("/proc/self/fd"))
    async with machine(qemu, image, ephemeral=True):
        pass
    assert len(os.listdir("/proc/self/fd")) == before

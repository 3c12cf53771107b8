# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that the newest data of each disk reaches its image in the end, and that nothing else is changed or removed."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import make_raw
from tests.machines import Machine, fresh_name, idle_machine
from tests.snapshots import clean_up, names_of, write
from vmspawn import Disk, Snapshot
from vmspawn.errors import SnapshotExists, SnapshotInUse, StartError, VmspawnError
from vmspawn.images import snapshot_files
from vmspawn.snapshots import removal
from vmspawn.snapshots.directory import CURRENT
from vmspawn.snapshots.listing import listed


def written(image: Path) -> list[int]:
    """Return the numbers of the blocks that `write` has written to a raw image."""
    content = image.read_bytes()
    return [
        number for number in range(8) if content[number << 16 : (number << 16) + 4096] == bytes([number + 1]) * 4096
    ]


async def attached(machine: Machine, path: Path) -> str:
    """Attach a disk, and return its device."""
    await machine.attach(Disk(str(path), "disk", "virtio-scsi"))
    return machine.disk("disk").device


def remove_all(machine: str) -> None:
    """Remove the snapshots of a machine that has ended, as vmctl does: the last removal merges."""
    for name in names_of(machine):
        if not name.endswith(f"@{CURRENT}"):
            removal.remove(name)
    assert names_of(machine) == []


async def test_a_symbolic_link_in_the_path_of_the_snapshots_does_no_harm(
    qemu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real" / "snapshots").mkdir(parents=True, mode=0o700)
    (tmp_path / "link").symlink_to("real")
    monkeypatch.setenv(snapshot_files.VARIABLE, str(tmp_path / "link" / "snapshots"))
    path = make_raw(tmp_path / "disk")
    async with idle_machine(qemu, tmp_path) as machine:
        device = await attached(machine, path)
        for number in range(4):
            await write(machine, device, number)
            await machine.snapshot()
        await write(machine, device, 4)
    remove_all(machine.name)
    assert written(path) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("how", ["detach", "replace"])
async def test_snapshots_after_a_disk_is_gone_keep_its_newest_data(qemu: str, tmp_path: Path, how: str) -> None:
    path, other = make_raw(tmp_path / "disk"), make_raw(tmp_path / "other")
    async with idle_machine(qemu, tmp_path) as machine:
        device = await attached(machine, path)
        await write(machine, device, 0)
        await machine.snapshot("a")
        await write(machine, device, 1)
        if how == "detach":
            await machine.detach("disk")
        else:
            await machine.replace("disk", str(other))
        await machine.snapshot("b")
        await machine.snapshot("c")
    remove_all(machine.name)
    assert written(path) == [0, 1]


async def test_a_name_that_is_used_again_does_not_replace_the_newest_data(qemu: str, tmp_path: Path) -> None:
    path, name = make_raw(tmp_path / "disk"), fresh_name()
    async with idle_machine(qemu, tmp_path, name=name) as machine:
        device = await attached(machine, path)
        await machine.snapshot("a")
        await write(machine, device, 1)
    async with idle_machine(qemu, tmp_path, name=name) as machine:
        await attached(machine, make_raw(tmp_path / "other"))
        with pytest.raises(SnapshotExists, match=f"newest data of an earlier machine {name}"):
            await machine.snapshot("b")
        assert await machine.status() == "running"
    assert names_of(name) == [f"{name}@a", f"{name}@{CURRENT}"]
    remove_all(name)
    assert written(path) == [1]


async def test_disks_may_follow_others_that_are_detached(qemu: str, tmp_path: Path) -> None:
    """MACHINE@current then lists no image of the machine, which it belongs to nevertheless, also after an adoption."""
    first, second = make_raw(tmp_path / "first"), make_raw(tmp_path / "second")
    async with idle_machine(qemu, tmp_path, image_disk_type="scsi-cd") as machine:
        device = await attached(machine, first)
        await machine.snapshot("a")
        await write(machine, device, 1)
        await machine.detach("disk")
        device = await attached(machine, second)
        await machine.leave()
        machine = await Machine.adopt(machine.name)
        overlays = os.path.join(snapshot_files.root(), f"{machine.name}@{CURRENT}")
        assert not [image.path for disk in machine.storage for image in disk.images if image.path.startswith(overlays)]
        await machine.snapshot("b")
        await write(machine, device, 2)
        await machine.close()
    remove_all(machine.name)
    assert (written(first), written(second)) == ([1], [2])


@pytest.mark.parametrize("by_fork", [False, True])
async def test_a_link_in_place_of_the_newest_disks_is_not_followed(qemu: str, tmp_path: Path, by_fork: bool) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("precious")
    async with idle_machine(qemu, tmp_path) as machine:
        await attached(machine, make_raw(tmp_path / "disk"))
        name = fresh_name() if by_fork else machine.name
        link = os.path.join(snapshot_files.root(), f"{name}@{CURRENT}")
        snapshot = await machine.snapshot("s") if by_fork else Snapshot("", 0.0, 0)
        os.symlink(precious, link)
        with pytest.raises(VmspawnError, match=CURRENT):
            if by_fork:
                await snapshot.fork(name, keep_disks=True).__aenter__()
            else:
                await machine.snapshot("s")
        assert os.listdir(precious) == ["file"]
        os.unlink(link)
        assert await machine.status() == "running"
    clean_up(machine.name)


async def test_a_damaged_manifest_makes_nothing_else_disappear(qemu: str, tmp_path: Path) -> None:
    async with idle_machine(qemu, tmp_path) as machine:
        await attached(machine, make_raw(tmp_path / "disk"))
        snapshot = await machine.snapshot("s")
        name = fresh_name()
        async with snapshot.fork(name, keep_disks=True):
            pass
        folder = Path(snapshot_files.root(), f"{name}@{CURRENT}")
        manifest, files = folder / snapshot_files.MANIFEST, sorted(os.listdir(folder))
        content = manifest.read_bytes()
        manifest.write_bytes(content[:100])
        with pytest.raises(SnapshotExists):
            await snapshot.fork(name, keep_disks=True).__aenter__()
        assert sorted(os.listdir(folder)) == files
        with pytest.raises(SnapshotInUse, match="manifest cannot be read"):
            await snapshot.remove()
        with pytest.raises(StartError, match="damaged") as caught:
            removal.remove(f"{name}@{CURRENT}")
        assert f"rm -r {folder}" in caught.value.hint
        manifest.write_bytes(content)
        clean_up(name)
    clean_up(machine.name)


@pytest.mark.parametrize("content", [{}, {"files": 3}, [], {"files": [{}], "images": {}}])
async def test_a_manifest_of_a_wrong_shape_disturbs_no_other_snapshot(
    qemu: str, tmp_path: Path, content: object
) -> None:
    folder = Path(snapshot_files.root(), f"{fresh_name()}@x")
    os.mkdir(folder, 0o700)
    (folder / snapshot_files.MANIFEST).write_text(json.dumps(content))
    path = make_raw(tmp_path / "disk")
    async with idle_machine(qemu, tmp_path) as machine:
        device = await attached(machine, path)
        await machine.snapshot("s")
        await write(machine, device, 2)
        assert f"{machine.name}@s" in [each.name for each in listed()]
    shutil.rmtree(folder)
    remove_all(machine.name)
    assert written(path) == [2]

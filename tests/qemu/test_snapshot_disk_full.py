# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests saves, copies and removals on a full disk: snapshots are complete or absent, and disks are kept."""

import asyncio
import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import MIB, make_raw
from tests.copies import inner, snapshot_paths
from tests.machines import Machine, fresh_name, idle_machine
from tests.qemu.qmp_fixtures import scaled
from tests.small_disks import PAGE, SmallDisk, small_disk
from tests.snapshots import STEPS_MAX, check_writable, clean_up, count_commands, is_whole, names_of, write
from vmspawn import Disk, Snapshot
from vmspawn.errors import StartError, SystemFailure
from vmspawn.images import snapshot_files
from vmspawn.snapshots import directory

#: More pages than the files of a copy have.
_PAGES_MAX = 60


@pytest.fixture
def small(tmp_path: Path) -> Iterator[SmallDisk]:
    """Put the directory of all snapshots on a small file system."""
    with small_disk(tmp_path / "small") as found, pytest.MonkeyPatch.context() as patch:
        patch.setenv(snapshot_files.VARIABLE, str(found.folder))
        yield found


async def test_a_full_disk_is_found_before_anything_is_paused(qemu: str, tmp_path: Path, small: SmallDisk) -> None:
    async with idle_machine(qemu, tmp_path) as machine:
        small.fill(pages_left=8 * MIB // PAGE)
        with machine.events() as events:
            with pytest.raises(SystemFailure, match="No space left"):
                await machine.snapshot()
            await machine.pause()
            # The first event is the pause by the test.
            assert (await anext(aiter(events))).name == "STOP"
        assert inner(machine).status == "paused"
        assert not snapshot_paths()


@pytest.mark.parametrize("keep_disks", [False, True], ids=["removed", "kept"])
async def test_a_copy_starts_or_leaves_nothing_behind(
    qemu: str, tmp_path: Path, small: SmallDisk, keep_disks: bool
) -> None:
    """Each attempt has one page more than the previous one, so that the space ends at each file."""
    path = make_raw(tmp_path / "disk")
    async with idle_machine(qemu, tmp_path) as machine:
        await machine.attach(Disk(str(path), "disk", "virtio-scsi"))
        snapshot = await machine.snapshot("s")
        name, before = fresh_name(), snapshot_paths()
        for pages in range(_PAGES_MAX):
            small.fill(pages_left=pages)
            failure = await start_and_end(snapshot, name, keep_disks=keep_disks)
            if not failure:
                break
            assert "No space left" in failure, f"{pages} pages"
            assert snapshot_paths() == before, f"{pages} pages"
        else:
            raise AssertionError("the copy never started")
        assert pages > 1
        assert names_of(name) == ([f"{name}@{directory.CURRENT}"] if keep_disks else [])
        clean_up(name)
        assert snapshot_paths() == before
        assert await machine.status() == "running"
        await check_writable(machine)
    clean_up(machine.name)
    assert not snapshot_paths()


async def start_and_end(snapshot: Snapshot, name: str, *, keep_disks: bool) -> str:
    """Start a copy, and end it. Returns the text of the error, or an empty string."""
    try:
        async with snapshot.fork(name, keep_disks=keep_disks) as copy:
            assert await copy.status() == "running"
    except (StartError, SystemFailure) as error:
        return str(error)
    return ""


@pytest.mark.scaled
async def test_a_snapshot_is_complete_or_absent_wherever_the_disk_becomes_full(
    qemu: str, tmp_path: Path, small: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = set()
    async with idle_machine(qemu, tmp_path) as machine:
        await machine.attach(Disk(str(make_raw(tmp_path / "disk")), "disk", "virtio-scsi"))
        # The soak tries every step, and other runs every third.
        for step in range(1, STEPS_MAX, 1 if scaled(2) > 2 else 3):
            name = f"{machine.name}@s{step}"
            steps = count_commands(machine, monkeypatch, small.fill, step)
            (error,) = await asyncio.gather(machine.snapshot(f"s{step}"), return_exceptions=True)
            failed = isinstance(error, SystemFailure) and error.errno == errno.ENOSPC
            assert failed or isinstance(error, Snapshot), f"step {step}: {error!r}"
            outcomes.add(failed)
            monkeypatch.undo()
            small.empty()
            await check_saved(machine, name)
            if len(steps) < step:
                break
        else:
            raise AssertionError(f"the save has more than {STEPS_MAX - 1} steps")
    assert outcomes == {True, False}
    clean_up(machine.name)
    assert not snapshot_paths()


async def check_saved(machine: Machine, name: str) -> None:
    """Check that a snapshot is complete or absent, and remove it. The machine runs with its disks."""
    assert await machine.status() == "running", name
    await check_writable(machine)
    assert set(names_of(machine.name)) <= {name, f"{machine.name}@{directory.CURRENT}"}
    assert all(is_whole(each) for each in names_of(machine.name)), name
    assert not [each for each in snapshot_paths() if snapshot_files.UNFINISHED in each or each.endswith(".new")], name
    if name in names_of(machine.name):
        directory.remove(name)


async def test_a_disk_that_is_full_at_a_removal_loses_nothing(qemu: str, tmp_path: Path, small: SmallDisk) -> None:
    with small_disk(tmp_path / "data") as data:
        path = make_raw(data.folder / "disk")
        async with idle_machine(qemu, tmp_path) as machine:
            await machine.attach(Disk(str(path), "disk", "virtio-scsi"))
            snapshot = await machine.snapshot("s")
            for number in range(16):
                await write(machine, machine.disk("disk").device, number)
        current = Snapshot(f"{machine.name}@{directory.CURRENT}", 0.0, 0)
        data.fill()
        small.fill()
        with pytest.raises(
            SystemFailure, match=rf"removed {snapshot.name}, but .*cannot write to {path}: No space left"
        ):
            await snapshot.remove()
        assert names_of(machine.name) == [current.name]
        # The end of the copy tries to merge the disks again.
        with pytest.warns(RuntimeWarning, match="No space left"):
            await check_content(current)
        data.empty()
        small.fill()
        before = snapshot_paths()
        with pytest.raises(SystemFailure, match=r"stay on overlays.*No space left"):
            await current.remove()
        assert snapshot_paths() == before
        small.empty()
        await current.remove()
        assert not snapshot_paths()
        with path.open("rb") as file:
            assert [file.read(1 << 16)[:4096] for _ in range(16)] == [bytes([each + 1]) * 4096 for each in range(16)]


async def check_content(current: Snapshot) -> None:
    """Check the content of a machine's newest disks in a copy, which boots from them."""
    async with current.fork() as copy:
        disk = next(each for each in inner(copy).storage if each.name == "disk")
        for number in range(16):
            command = f'qemu-io -d {disk.device} "read -P {number + 1} {number << 16} 4k"'
            done = await inner(copy).monitor.execute("human-monitor-command", {"command-line": command})
            assert not done.strip(), done

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests saves that fail, or whose manager or QEMU dies: snapshots are complete or absent, and disks are kept."""

import asyncio
import contextlib
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_raw
from tests.copies import snapshot_paths
from tests.dying import Dying
from tests.machines import adopted, end_adopted, fresh_name, idle_machine
from tests.qemu.qmp_fixtures import scaled
from tests.snapshots import STEPS_MAX, check_writable, clean_up, count_commands, is_whole, names_of
from tests.survivors import wait_until_dead
from vmspawn import Disk, Snapshot
from vmspawn.errors import NotConnected, QmpError, StartError, SystemFailure
from vmspawn.host.runtime import CONTROL
from vmspawn.images import snapshot_files
from vmspawn.snapshots import directory


@pytest.mark.parametrize("when", ["before", "after", "command"])
async def test_a_snapshot_is_complete_or_absent_wherever_the_manager_dies(
    qemu: str, tmp_path: Path, doomed: Dying, when: str
) -> None:
    async with idle_machine(qemu, tmp_path) as machine:
        name = machine.name
        await machine.leave()
        try:
            for step in range(1, STEPS_MAX):
                path = make_raw(tmp_path / f"disk{step}")
                async with adopted(name) as first:
                    await first.attach(Disk(str(path), "disk", "virtio-scsi"))
                outcome = await asyncio.to_thread(doomed.order, name, "snapshot", step, when, f"s{step}")
                assert outcome in ("died", "finished")
                await check_survived(name, step)
                if outcome == "finished":
                    return
            raise AssertionError(f"the save has more than {STEPS_MAX - 1} steps")
        finally:
            await end_adopted(name)
            clean_up(name)


async def check_survived(name: str, step: int) -> None:
    """Check that the machine runs with its disk, and that the snapshot is complete or absent."""
    async with adopted(name) as machine:
        assert await machine.status() == "running", f"step {step}: {machine.adoption_notes}"
        (disk,) = (each for each in machine.storage if not each.is_boot)
        assert len(disk.images) == 1, f"step {step}"
        assert disk.images[0].is_writable
        nodes = await machine.monitor.execute("query-named-block-nodes", {"flat": True})
        writable = {each["node-name"] for each in nodes if not each["ro"]}
        assert disk.images[0].top_node in writable, f"step {step}: {machine.adoption_notes}"
        known = {each for image in disk.images[0].chain for each in (image.file_node, image.top_node)}
        assert known <= {each["node-name"] for each in nodes}
        assert not [each for each in snapshot_paths() if each.startswith(snapshot_files.UNFINISHED)], f"step {step}"
        for snapshot in names_of(name):
            assert is_whole(snapshot)
        await machine.detach("disk")


@pytest.mark.scaled
@pytest.mark.parametrize(
    "when", [*(pytest.param(each, marks=pytest.mark.soak) for each in ("before", "after")), "command"]
)
async def test_a_copy_is_complete_or_absent_wherever_its_manager_dies(
    qemu: str, tmp_path: Path, doomed: Dying, when: str
) -> None:
    path = make_raw(tmp_path / "disk")
    async with idle_machine(qemu, tmp_path) as machine:
        await machine.attach(Disk(str(path), "disk", "virtio-scsi"))
        snapshot = await machine.snapshot("s")
        name, before, content = machine.name, snapshot_paths(), path.read_bytes()
        await machine.leave()
        try:
            # The soak tries every step, and other runs every fourth.
            for step in range(1, STEPS_MAX, 1 if scaled(2) > 2 else 4):
                copy = fresh_name()
                outcome = await asyncio.to_thread(doomed.order, name, "fork", step, when, snapshot.name, copy)
                assert outcome in ("died", "finished")
                is_complete = await copy_survived(snapshot, copy)
                assert is_complete or outcome == "died"
                assert snapshot_paths() == before, f"step {step}"
                assert path.read_bytes() == content, f"step {step}"
                if outcome == "finished":
                    return
            raise AssertionError("the copy was never complete")
        finally:
            await end_adopted(name)
            clean_up(name)


async def copy_survived(snapshot: Snapshot, name: str) -> bool:
    """Adopt the copy of a manager that died, and end it. Returns False if nothing of it is left."""
    try:
        async with adopted(name) as copy:
            assert await copy.status() == "running"
            (disk,) = (each for each in copy.storage if not each.is_boot)
            assert disk.images[0].base is not None
            await copy.detach("disk")
            await copy.terminate()
            await copy.wait()
    except (NotConnected, StartError):
        # Another copy can have its name.
        async with snapshot.fork(name) as again:
            assert await again.status() == "running"
        return False
    return True


async def test_a_save_during_which_qemu_dies_leaves_nothing_behind(qemu: str, tmp_path: Path) -> None:
    before = snapshot_paths()
    async with idle_machine(qemu, tmp_path) as machine:
        saving = asyncio.create_task(machine.snapshot())
        with machine.events() as events:
            async for event in events:
                if event.name == "STOP":
                    os.kill(machine.pid, signal.SIGKILL)
                    break
        with pytest.raises(NotConnected):
            await saving
        wait_until_dead(machine.pid)
        await machine.wait()
    assert snapshot_paths() == before


@pytest.mark.scaled
async def test_a_snapshot_is_complete_or_absent_wherever_qemu_dies(
    qemu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The soak tries every step, and other runs every second.
    for step in range(1, STEPS_MAX, 1 if scaled(2) > 2 else 2):
        path = make_raw(tmp_path / f"disk{step}")
        async with idle_machine(qemu, tmp_path) as machine:
            await machine.attach(Disk(str(path), "disk", "virtio-scsi"))
            steps = count_commands(machine, monkeypatch, lambda: os.kill(machine.pid, signal.SIGKILL), step)
            with contextlib.suppress(NotConnected, SystemFailure, QmpError):
                await machine.snapshot("s")
            monkeypatch.undo()
            await machine.terminate()
            await machine.wait()
        assert not [each for each in snapshot_paths() if each.startswith(snapshot_files.UNFINISHED)], f"step {step}"
        assert all(is_whole(each) for each in names_of(machine.name)), f"step {step}"
        clean_up(machine.name)
        if len(steps) < step:
            return
    raise AssertionError(f"the save has more than {STEPS_MAX - 1} steps")


async def test_a_save_that_is_cancelled_leaves_nothing_behind(qemu: str, tmp_path: Path) -> None:
    async with idle_machine(qemu, tmp_path) as machine:
        before = snapshot_paths()
        saving = asyncio.create_task(machine.snapshot())
        with machine.events() as events:
            async for event in events:
                if event.name == "STOP":
                    saving.cancel()
                    break
        with pytest.raises(asyncio.CancelledError):
            await saving
        assert snapshot_paths() == before
        assert await machine.status() == "running"
        assert all(len(each.images) == 1 and each.images[0].base is None for each in machine.storage)
        snapshot = await machine.snapshot()
    await snapshot.remove()
    clean_up(machine.name)


@pytest.mark.scaled
async def test_a_save_that_is_cancelled_after_any_command_leaves_no_snapshot(
    qemu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with idle_machine(qemu, tmp_path) as machine:
        await machine.attach(Disk(str(make_raw(tmp_path / "disk")), "disk", "virtio-scsi"))
        # The soak tries every step, and other runs every third.
        for step in range(1, STEPS_MAX, 1 if scaled(2) > 2 else 3):
            saving = asyncio.create_task(machine.snapshot(f"s{step}"))
            steps = count_commands(machine, monkeypatch, partial(cancel, saving), step)
            cancelled = bool(await asyncio.gather(saving, return_exceptions=True)) and saving.cancelled()
            monkeypatch.undo()
            assert cancelled == (len(steps) >= step), f"step {step}"
            assert await machine.status() == "running", f"step {step}"
            saved = {f"{machine.name}@s{step}", f"{machine.name}@{directory.CURRENT}"}
            assert set(names_of(machine.name)) <= saved - ({f"{machine.name}@s{step}"} if cancelled else set())
            assert not [each for each in snapshot_paths() if each.startswith(snapshot_files.UNFINISHED)], f"step {step}"
            await check_writable(machine)
            if not cancelled:
                break
        else:
            raise AssertionError(f"the save has more than {STEPS_MAX - 1} steps")
    clean_up(machine.name)


def cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()


async def test_a_disconnect_undoes_the_clients_save(qemu: str, tmp_path: Path) -> None:
    async with idle_machine(qemu, tmp_path, control=True) as machine:
        before = snapshot_paths()
        _, writer = await asyncio.open_unix_connection(machine.directory.file(CONTROL))
        with machine.events() as events:
            writer.write(b'{"method":"io.vmspawn.Machine.Snapshot","more":true}\0')
            async for event in events:
                if event.name == "STOP":
                    writer.close()
                    break
            async for event in events:
                if event.name == "RESUME":
                    break
        # Holding the machine succeeds only when the save has released it.
        async with machine.inner.held(timeout=20):
            assert snapshot_paths() == before
        assert await machine.status() == "running"


async def test_a_machine_that_has_ended_starts_from_its_newest_disks(qemu: str, tmp_path: Path) -> None:
    name = fresh_name()
    async with idle_machine(qemu, tmp_path, name=name) as machine:
        snapshot = await machine.snapshot("s")
    newest = Snapshot(f"{name}@{directory.CURRENT}", 0.0, 0)
    async with newest.fork() as copy:
        assert await copy.status() == "running"
    await snapshot.remove()
    clean_up(name)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests removals of snapshots that are killed or fail at each step: the newest data of the disks is never lost."""

import asyncio
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.conftest import make_raw
from tests.copies import snapshot_paths
from tests.machines import fresh_name, idle_machine
from tests.qemu.qmp_fixtures import scaled
from tests.small_disks import small_disk
from tests.snapshots import write
from vmspawn import Disk
from vmspawn.errors import NoSuchSnapshot, SystemFailure, VmspawnError
from vmspawn.images import snapshot_files
from vmspawn.snapshots import merge, removal
from vmspawn.snapshots.directory import CURRENT

#: More steps than a removal has.
STEPS_MAX = 60

#: Removes a snapshot, and dies before the system call with the given number that changes files or starts QEMU.
_REMOVE_AND_DIE = """
import os, signal, sys
from vmspawn.snapshots import merge, removal

left = int(sys.argv[2])

def count(event, arguments):
    global left
    changes = event in ("os.rename", "os.remove", "os.rmdir", "subprocess.Popen")
    if changes or event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT:
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
removal.remove(sys.argv[1])
"""


class Ended:
    """The files of a machine that has ended: a disk image, one snapshot, and an overlay with newer data."""

    def __init__(self, name: str, image: Path, kept: Path) -> None:
        self.name, self._image, self._kept = name, image, kept
        shutil.copytree(snapshot_files.root(), kept / "snapshots")
        shutil.copy2(image, kept / "image")

    def restore(self) -> None:
        """Restore the files as they were when the machine ended."""
        shutil.rmtree(snapshot_files.root())
        shutil.copytree(self._kept / "snapshots", snapshot_files.root())
        shutil.copy2(self._kept / "image", self._image)

    def remove(self) -> None:
        """Remove all that is left of the snapshots, as a user does who follows the hints."""
        for name in ("s", CURRENT):
            try:
                removal.remove(f"{self.name}@{name}")
            except NoSuchSnapshot:
                continue
        assert not [
            each for each in snapshot_paths() if self.name in each and not each.startswith(snapshot_files.UNFINISHED)
        ]

    def check_data(self) -> None:
        """Check that the image has the newest data."""
        assert self._image.read_bytes()[:4096] == bytes([1]) * 4096


@pytest_asyncio.fixture
async def ended(qemu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Ended]:
    monkeypatch.setenv(snapshot_files.VARIABLE, str(tmp_path / "snapshots"))
    path = make_raw(tmp_path / "disk", 1 << 20)
    async with idle_machine(qemu, tmp_path, name=fresh_name()) as machine:
        await machine.attach(Disk(str(path), bus="virtio-scsi"))
        await machine.snapshot("s")
        await write(machine, machine.disk("disk").device, 0)
    (tmp_path / "kept").mkdir()
    assert path.read_bytes()[:4096] == bytes(4096)
    yield Ended(machine.name, path, tmp_path / "kept")


@pytest.mark.scaled
async def test_a_removal_that_is_killed_at_any_step_loses_no_data(ended: Ended) -> None:
    # The soak tries every step, and other runs every third.
    for step in range(1, STEPS_MAX, 1 if scaled(2) > 2 else 3):
        ended.restore()
        command = [sys.executable, "-c", _REMOVE_AND_DIE, f"{ended.name}@s", str(step)]
        done = await asyncio.to_thread(subprocess.run, command, check=False, timeout=60)
        assert done.returncode in (0, -signal.SIGKILL)
        if done.returncode == 0:
            ended.check_data()
            assert not [each for each in snapshot_paths() if ended.name in each]
            return
        # A directory that is left is a complete snapshot, or its name marks it as unfinished.
        await asyncio.to_thread(ended.remove)
        ended.check_data()
    raise AssertionError(f"the removal has more than {STEPS_MAX - 1} steps")


async def test_a_merge_whose_qemu_dies_at_any_step_loses_no_data(ended: Ended, monkeypatch: pytest.MonkeyPatch) -> None:
    execute = merge._Talk.execute
    for step in range(1, STEPS_MAX):
        ended.restore()
        steps = 0

        def counted(self: merge._Talk, *arguments: Any, last: int = step) -> Any:
            nonlocal steps
            steps += 1
            if steps == last:
                self._process.kill()
            return execute(self, *arguments)

        monkeypatch.setattr(merge._Talk, "execute", counted)
        (error,) = await asyncio.gather(asyncio.to_thread(removal.remove, f"{ended.name}@s"), return_exceptions=True)
        monkeypatch.setattr(merge._Talk, "execute", execute)
        if steps < step:
            assert error is None
            ended.check_data()
            assert not [each for each in snapshot_paths() if ended.name in each]
            return
        # QEMU may die after it has done everything.
        assert error is None or isinstance(error, SystemFailure)
        assert error is None or f"vmctl remove-snapshot {ended.name}@{CURRENT}" in error.hint
        await asyncio.to_thread(ended.remove)
        ended.check_data()
    raise AssertionError(f"the merge has more than {STEPS_MAX - 1} steps")


async def test_a_removal_can_be_repeated_when_the_disk_is_no_longer_full(qemu: str, tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", 2 << 20) as small:
        path = make_raw(small.folder / "disk", 1 << 20)
        async with idle_machine(qemu, tmp_path) as machine:
            await machine.attach(Disk(str(path), bus="virtio-scsi"))
            snapshot = await machine.snapshot("s")
            await write(machine, machine.disk("disk").device, 0)
        small.fill()
        with pytest.raises(VmspawnError, match="stay on overlays") as caught:
            await snapshot.remove()
        assert "No space left" in str(caught.value)
        small.empty()
        await asyncio.to_thread(removal.remove, f"{machine.name}@{CURRENT}")
        assert path.read_bytes()[:4096] == bytes([1]) * 4096
        assert not [each for each in snapshot_paths() if machine.name in each]

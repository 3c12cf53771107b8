# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that files of earlier machines and of killed programs do not obstruct saves and copies with the same names."""

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import make_raw
from tests.copies import snapshot_paths
from tests.machines import fresh_name, idle_machine
from tests.snapshots import clean_up, names_of
from vmspawn import Disk
from vmspawn.errors import SnapshotExists
from vmspawn.snapshots import directory
from vmspawn.snapshots.directory import CURRENT

#: More files than a copy makes before QEMU is started.
_FILES_MAX = 60

#: Starts a copy that keeps its disks, and dies before it makes the file with the given number. Exits with status 7
#: before QEMU is started.
_FORK_AND_DIE = """
import os, signal, sys
from vmspawn import MachineConfig
from vmspawn.snapshots.fork import fork

files = int(sys.argv[3])

def count(event, arguments):
    global files
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT:
        files -= 1
        if files == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    if event == "os.posix_spawn":
        os._exit(7)

sys.addaudithook(count)
fork(MachineConfig(name=sys.argv[2], console="headless"), sys.argv[1], keep_disks=True)
"""

#: Saves a machine, and dies together with QEMU when the overlay of the second disk is made.
_SAVE_AND_DIE = """
import contextlib, os, signal, sys
import vmspawn.sync

name, binary, image, *paths = sys.argv[1:]
overlays = 0

def count(event, arguments):
    global overlays
    if event == "open" and str(arguments[0]).endswith(".qcow2") and arguments[2] & os.O_CREAT:
        overlays += 1
        if overlays == 2:
            os.kill(machine.pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):  # vmspawn may have reaped it already
                os.waitid(os.P_PID, machine.pid, os.WEXITED | os.WNOWAIT)
            os.kill(os.getpid(), signal.SIGKILL)

disks = [vmspawn.Disk(path, bus="virtio-scsi") for path in paths]
options = {"name": name, "image": image, "qemu": binary, "console": "headless", "extra_disks": disks}
with vmspawn.sync.Machine(**options) as machine:
    sys.addaudithook(count)
    machine.snapshot("s")
"""


async def run(program: str, *arguments: str) -> int:
    """Run a Python program, and return its exit status."""
    command = [sys.executable, "-c", program, *arguments]
    return (await asyncio.to_thread(subprocess.run, command, check=False, timeout=60)).returncode


async def test_a_copy_starts_after_one_that_was_killed(qemu: str, tmp_path: Path) -> None:
    path = make_raw(tmp_path / "disk")
    async with idle_machine(qemu, tmp_path) as machine:
        await machine.attach(Disk(str(path), "disk", "virtio-scsi"))
        snapshot = await machine.snapshot("s")
        name, before = fresh_name(), snapshot_paths()
        remained = False
        for number in range(1, _FILES_MAX):
            status = await run(_FORK_AND_DIE, snapshot.name, name, str(number))
            assert status in (-signal.SIGKILL, 7)
            remained |= snapshot_paths() > before
            # A complete MACHINE@current may be removed like that of a copy that has run.
            clean_up(name)
            async with snapshot.fork(name, keep_disks=True) as copy:
                assert await copy.status() == "running"
            assert names_of(name) == [f"{name}@{CURRENT}"]
            clean_up(name)
            assert snapshot_paths() == before, f"file {number}"
            if status == 7:
                break
        else:
            raise AssertionError("QEMU was never started")
        assert remained
    clean_up(machine.name)


async def test_kept_disks_are_not_replaced(qemu: str, tmp_path: Path) -> None:
    async with idle_machine(qemu, tmp_path) as machine:
        await machine.attach(Disk(str(make_raw(tmp_path / "disk")), "disk", "virtio-scsi"))
        snapshot = await machine.snapshot("s")
        name = fresh_name()
        async with snapshot.fork(name, keep_disks=True):
            pass
        kept = snapshot_paths()
        with pytest.raises(SnapshotExists, match=f"disks of an earlier machine {name}") as caught:
            await snapshot.fork(name, keep_disks=True).__aenter__()
        assert f"vmctl remove-snapshot {name}@{CURRENT}" in caught.value.hint
        assert snapshot_paths() == kept
        clean_up(name)
        async with snapshot.fork(name, keep_disks=True):
            pass
        clean_up(name)
    clean_up(machine.name)


async def test_copies_without_a_given_name_do_not_replace_kept_disks(qemu: str, tmp_path: Path) -> None:
    async with idle_machine(qemu, tmp_path) as machine:
        await machine.attach(Disk(str(make_raw(tmp_path / "disk")), "disk", "virtio-scsi"))
        snapshot = await machine.snapshot("s")
        names = []
        for _ in range(2):
            async with snapshot.fork(keep_disks=True) as copy:
                names.append(copy.name)
        assert names == [f"{machine.name}-fork1", f"{machine.name}-fork2"]
        for name in names:
            clean_up(name)
    clean_up(machine.name)


async def test_a_save_works_after_one_that_was_killed_with_its_qemu(qemu: str, tmp_path: Path) -> None:
    name = fresh_name()
    boot, *paths = (str(make_raw(tmp_path / each)) for each in ("boot", "one", "two"))
    before = snapshot_paths()
    assert await run(_SAVE_AND_DIE, name, qemu, boot, *paths) == -signal.SIGKILL
    assert any(each.endswith(".qcow2") for each in snapshot_paths() - before)
    disks = [Disk(path, bus="virtio-scsi") for path in paths]
    async with idle_machine(qemu, tmp_path, name=name, image=boot, extra_disks=disks) as machine:
        await machine.snapshot("s")
        current = directory.OpenSnapshot(f"{name}@{CURRENT}")
        current.close()
        assert {disk.images[0].path for disk in machine.storage} <= set(current.manifest.images.values())
    clean_up(name)
    assert snapshot_paths() == before

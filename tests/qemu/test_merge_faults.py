# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that merges write only to the snapshot's own images, and that a merge's QEMU ends with the merge."""

import asyncio
import json
import os
import select
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import pytest_asyncio

from tests.commands import VMCTL, one_line, vmctl, vmctl_output
from tests.conftest import make_raw
from tests.copies import snapshot_paths
from tests.loop import Loop
from tests.machines import fresh_name, idle_machine
from tests.snapshots import write
from tests.survivors import wait_until_dead
from vmspawn import Disk
from vmspawn.errors import SystemFailure
from vmspawn.images import snapshot_files
from vmspawn.snapshots import removal
from vmspawn.snapshots.directory import CURRENT

SIZE = 1 << 20

#: Seconds within which vmctl must start the merge.
START_MAX = 60

#: Removes a snapshot, and dies before it starts the merge's QEMU, after it has recorded that the images may change.
_REMOVE_AND_DIE = """
import os, signal, sys
from vmspawn.snapshots import removal

def die(event, arguments):
    if event == "subprocess.Popen":
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(die)
removal.remove(sys.argv[1])
"""

#: Reports its process id, and becomes a QEMU whose output nobody reads.
_SILENT_QEMU = """#!/bin/sh
echo $$ > {report}
exec 3>&1 {qemu} "$@" > /dev/null
"""


class Ended:
    """A machine that has ended, with one disk, the snapshot `s`, and an overlay with newer data."""

    def __init__(self, name: str, disk: Path) -> None:
        self.name, self.disk = name, disk

    def remove(self, snapshot: str) -> None:
        """Remove a snapshot, as vmctl does."""
        removal.remove(f"{self.name}@{snapshot}")

    def interrupt(self) -> None:
        """Remove `s` by a process that is killed when it begins to write to the image."""
        command = [sys.executable, "-c", _REMOVE_AND_DIE, f"{self.name}@s"]
        done = subprocess.run(command, check=False, timeout=60, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr

    def check_merged(self, disk: Path) -> None:
        """Check that the disk has the newest data, and that nothing is left of the snapshots."""
        assert disk.read_bytes()[:4096] == bytes([1]) * 4096
        assert not [each for each in snapshot_paths() if self.name in each]


async def end_with_overlay(qemu: str, folder: Path, disk: Path) -> Ended:
    async with idle_machine(qemu, folder, name=fresh_name()) as machine:
        await machine.attach(Disk(str(disk), "disk", "virtio-scsi"))
        await machine.snapshot("s")
        await write(machine, machine.disk("disk").device, 0)
    return Ended(machine.name, disk)


@pytest_asyncio.fixture
async def ended(qemu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Ended]:
    monkeypatch.setenv(snapshot_files.VARIABLE, str(tmp_path / "snapshots"))
    yield await end_with_overlay(qemu, tmp_path, make_raw(tmp_path / "disk", SIZE))


@pytest.mark.parametrize("is_interrupted", [False, True], ids=["first", "interrupted"])
async def test_a_merge_writes_to_no_other_file_at_the_path_of_the_image(
    ended: Ended, tmp_path: Path, is_interrupted: bool
) -> None:
    if is_interrupted:
        ended.interrupt()
    moved = ended.disk.rename(tmp_path / "moved")
    # The other file has the same size and time.
    shutil.copy2(moved, ended.disk)
    for snapshot in (CURRENT,) if is_interrupted else ("s", CURRENT):
        with pytest.raises(SystemFailure, match="is not the file that the snapshot was made of") as caught:
            ended.remove(snapshot)
        assert str(ended.disk) in caught.value.hint
    assert ended.disk.read_bytes() == bytes(SIZE)
    moved.rename(ended.disk)
    ended.remove(CURRENT)
    ended.check_merged(ended.disk)


def test_a_merge_writes_to_no_image_that_has_changed(ended: Ended) -> None:
    ended.disk.write_bytes(b"changed".ljust(SIZE, b"\0"))
    for snapshot in ("s", CURRENT):
        with pytest.raises(SystemFailure, match="has changed since the snapshot was made") as caught:
            ended.remove(snapshot)
        assert ended.disk.read_bytes().startswith(b"changed")
    ended.disk.write_bytes(bytes(SIZE))
    # The hint contains the command that restores the time.
    command = caught.value.hint.partition("has changed: ")[2].partition(";")[0]
    assert command.startswith("touch ")
    subprocess.run(shlex.split(command), check=True)
    ended.remove(CURRENT)
    ended.check_merged(ended.disk)


async def test_a_merge_writes_to_no_other_block_device(
    qemu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(snapshot_files.VARIABLE, str(tmp_path / "snapshots"))
    node = tmp_path / "device"

    def point_to(device: Loop) -> None:
        node.unlink(missing_ok=True)
        os.mknod(node, stat.S_IFBLK | 0o600, os.stat(device.path).st_rdev)

    with Loop(tmp_path / "file", SIZE) as device, Loop(tmp_path / "other", SIZE) as other:
        point_to(device)
        ended = await end_with_overlay(qemu, tmp_path, node)
        point_to(other)
        with pytest.raises(SystemFailure, match="is not the block device that the snapshot was made of"):
            ended.remove("s")
        point_to(device)
        ended.remove(CURRENT)
    ended.check_merged(tmp_path / "file")
    assert (tmp_path / "other").read_bytes() == bytes(SIZE)


async def test_the_error_for_a_missing_image_names_it_once(ended: Ended, tmp_path: Path) -> None:
    moved = ended.disk.rename(tmp_path / "moved")
    done = vmctl("remove-snapshot", f"{ended.name}@s")
    assert one_line(done, "vmctl").endswith(f"to the images: cannot open {ended.disk}: No such file or directory")
    moved.rename(ended.disk)
    vmctl_output("remove-snapshot", f"{ended.name}@{CURRENT}")
    ended.check_merged(ended.disk)


@contextmanager
def other_qemu(ended: Ended, program: Path) -> Iterator[None]:
    """Make merges run another program as QEMU."""
    path = Path(snapshot_files.current_folder(ended.name), snapshot_files.MANIFEST)
    found = json.loads(path.read_bytes())
    qemu, found["qemu"]["path"] = found["qemu"]["path"], str(program)
    path.write_text(json.dumps(found))
    yield
    # The merge has replaced the manifest.
    found = json.loads(path.read_bytes())
    found["qemu"]["path"] = qemu
    path.write_text(json.dumps(found))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
async def test_the_qemu_of_a_merge_ends_with_vmctl(
    ended: Ended, qemu: str, tmp_path: Path, number: signal.Signals
) -> None:
    report, silent = tmp_path / "report", tmp_path / "qemu"
    os.mkfifo(report)
    silent.write_text(_SILENT_QEMU.format(report=shlex.quote(str(report)), qemu=shlex.quote(qemu)))
    silent.chmod(0o700)
    reader = os.open(report, os.O_RDONLY | os.O_NONBLOCK)
    with other_qemu(ended, silent):
        command = [*VMCTL, "remove-snapshot", f"{ended.name}@s"]
        process = await asyncio.to_thread(subprocess.Popen, command, stderr=subprocess.PIPE)
        with process:
            assert select.select([reader], [], [], START_MAX)[0], "vmctl has not started QEMU"
            # The line is written at once.
            pid = int(os.read(reader, 32))
            os.close(reader)
            try:
                process.send_signal(number)
                wait_until_dead(pid)
                # As of a shell, if vmctl handles the signal.
                assert process.wait(60) == (-number if number == signal.SIGKILL else 128 + number)
            finally:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    ended.remove(CURRENT)
    ended.check_merged(ended.disk)

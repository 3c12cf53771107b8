# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that an image and its file system are consistent after QEMU was killed while the guest wrote files."""

import asyncio
import os
import subprocess
from pathlib import Path

import pytest

from tests.commands import vmctl
from tests.conftest import MIB
from tests.guest.writing import ask
from tests.machines import fresh_name
from tests.qemu.qmp_fixtures import SCALE
from tests.shell import Shell
from tests.survivors import survivor
from vmspawn.host.runtime import CONSOLE

#: Writes one file after the other, and counts each file after it has been synced to the disk.
_WRITER = "n=0; while echo record $n >/mnt/$n && sync; do n=$((n + 1)); echo $n >/tmp/new; mv /tmp/new /tmp/files; done"

#: The minimum number of files that the guest writes before QEMU is killed.
_FILES = 10


@pytest.mark.scaled
async def test_a_file_system_is_consistent_after_qemu_is_killed(qemu: str, tmp_path: Path) -> None:
    for _ in range(max(1, min(20, round(SCALE)))):
        image = await asyncio.to_thread(make_ext4, tmp_path)
        with survivor(fresh_name(), f"--qemu={qemu}", "--guest=builtin", "--warm", "--console=headless") as guest:
            shell = await Shell.connect(os.path.join(guest.folder, CONSOLE))
            done = await asyncio.to_thread(vmctl, "attach-disk", guest.name, str(image), "--format=qcow2", "--name=fs")
            assert done.returncode == 0, done.stderr
            device = "/dev/disk/by-id/virtio-fs"
            await shell.run(f"until [ -b {device} ]; do usleep 10000; done")
            await shell.run(f"mkdir -p /mnt; modprobe ext4; mount -t ext4 {device} /mnt")
            await shell.run(f"(setsid sh -c '{_WRITER}' </dev/null >/dev/null 2>&1 &)")
            await shell.run(f"until [ -s /tmp/files ] && [ $(cat /tmp/files) -ge {_FILES} ]; do usleep 10000; done")
            count = int(await ask(shell, "cat /tmp/files"))
            guest.kill_qemu()
            shell.close()
        await asyncio.to_thread(check, image, tmp_path / "copy", count)


def run(*command: object) -> tuple[int, str]:
    """Run a program, and return its exit status and output."""
    words = [str(word) for word in command]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode, done.stdout


def make_ext4(folder: Path) -> Path:
    """Make a qcow2 image with an empty ext4 file system with a journal."""
    raw, image = folder / "raw", folder / "fs"
    for command in (
        ("mkfs.ext4", "-q", "-F", raw, f"{64 * MIB >> 10}k"),
        ("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image),
    ):
        status, said = run(*command)
        assert status == 0, said
    raw.unlink()
    return image


def check(image: Path, copy: Path, count: int) -> None:
    """Check the image, then the file system after replaying its journal; every synced file must exist."""
    # Status 3 means leaked clusters, which waste space but lose no data; 2 would be corruption.
    status, said = run("qemu-img", "check", image)
    assert status in (0, 3), said
    assert run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, copy)[0] == 0
    # Replay the journal, as the next mount does. Status 0 or 1 means that nothing else was repaired.
    status, said = run("e2fsck", "-E", "journal_only", "-y", copy)
    assert status in (0, 1), said
    status, said = run("e2fsck", "-f", "-n", copy)
    assert status == 0, said
    for number in range(count):
        assert f"record {number}\n" in run("debugfs", "-R", f"cat /{number}", copy)[1]

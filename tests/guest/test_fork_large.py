# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests copies of large machines: 256 hot-plugged SCSI disks, and 4 GB of memory."""

import asyncio
import hashlib
import os
import shutil
import time
from pathlib import Path

import pytest

from tests.conftest import MIB, make_raw
from tests.copies import inner, is_part_of_snapshot
from tests.figures import figure
from tests.shell import booted
from vmspawn import Disk
from vmspawn.api import machine as api

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]

#: The number of SCSI targets.
DISKS = 256

#: The disks with content: the first, the last, and some between them.
CHECKED = (0, 1, 100, 127, 128, 200, 255)

#: Seconds for a command that uses all disks or much memory, under emulation on a busy host.
TIMEOUT = 300.0

GIB = 1 << 30
RAM = 4 * GIB
#: The sizes of a file in the guest's memory, and of a disk that the guest's page cache contains.
FILE_SIZE = 512 * MIB
CACHED_SIZE = 2 * GIB


async def test_a_copy_has_256_hot_plugged_disks(qemu: str, tmp_path: Path) -> None:
    paths = [make_raw(tmp_path / f"disk{number}", MIB) for number in range(DISKS)]
    async with booted(qemu) as guest:
        machine = guest.machine
        attached = await asyncio.gather(*(machine.attach(Disk(str(path), bus="virtio-scsi")) for path in paths))
        devices = [attached[number].by_id for number in CHECKED]
        await wait_for_disks(machine, DISKS)
        await write_all(machine, devices, "saved")
        snapshot = await machine.snapshot()
        figure(f"{DISKS} SCSI disks: pause of the save", f"{snapshot.pause:.2f} s")
        await write_all(machine, devices, "source")
        async with snapshot.fork() as copy, snapshot.fork() as other:
            for each in (copy, other):
                assert sum(not disk.is_boot for disk in inner(each).storage) == DISKS
                await wait_for_disks(each, DISKS)
                assert await read_all(each, devices) == ["saved"] * len(CHECKED)
            await write_all(copy, devices, "copy")
            await copy.detach(paths[100].name)
            await wait_for_disks(copy, DISKS - 1)
            assert await read_all(copy, devices[:2]) == ["copy"] * 2
            assert await read_all(other, devices) == ["saved"] * len(CHECKED)
        assert await read_all(machine, devices) == ["source"] * len(CHECKED)
        assert is_part_of_snapshot(paths[0])
        await snapshot.remove()
    # After the machine has ended, each disk is one file again.
    assert not any(map(is_part_of_snapshot, paths))
    contents = [path.read_bytes() for path in paths]
    assert [number for number, content in enumerate(contents) if content.startswith(b"source\n")] == list(CHECKED)
    assert sum(content == bytes(MIB) for content in contents) == DISKS - len(CHECKED)


async def wait_for_disks(machine: api.Machine, count: int) -> None:
    """Wait until the guest has exactly this number of SCSI disks."""
    command = f"until [ $(ls -d /sys/block/sd* | wc -l) -eq {count} ]; do usleep 100000; done"
    await machine.run(command, check=True, timeout=TIMEOUT)


async def write_all(machine: api.Machine, devices: list[str], text: str) -> None:
    """Write a text to the beginning of each disk, once the guest has the disk's link."""
    wait = "until [ -b $each ]; do usleep 10000; done"
    write = f"echo {text} | dd of=$each bs=4096 conv=fsync,notrunc,sync"
    command = f"for each in {' '.join(devices)}; do {wait}; {write} || exit; done"
    await machine.run(command, check=True, timeout=TIMEOUT)


async def read_all(machine: api.Machine, devices: list[str]) -> list[str]:
    """Read the text at the beginning of each disk, after dropping the guest's cache."""
    command = f"echo 3 >/proc/sys/vm/drop_caches; for each in {' '.join(devices)}; do head -n 1 $each; done"
    return (await machine.run(command, check=True, timeout=TIMEOUT)).stdout.split()


@pytest.mark.parametrize("backing", ["anonymous", "file"])
async def test_a_copy_has_all_of_4_gb_of_memory(qemu: str, tmp_path: Path, backing: str) -> None:
    need_space(tmp_path)
    content = tmp_path / "content"
    checksum = make_content(content)
    async with booted(qemu, ram=RAM, ram_backing=backing) as guest:
        machine = guest.machine
        disk = (await machine.attach(Disk(str(content), read_only=True))).by_id
        fill = (
            f"until [ -b {disk} ]; do usleep 10000; done; head -c {FILE_SIZE} {disk} >/tmp/big; cat {disk} >/dev/null"
        )
        await machine.run(fill, check=True, timeout=TIMEOUT)
        snapshot = await machine.snapshot()
        await machine.run("rm /tmp/big", check=True, timeout=TIMEOUT)
        begun = time.perf_counter()
        async with snapshot.fork() as copy:
            assert await copy.status() == "running"
            runs = time.perf_counter() - begun
            await copy.run("true", check=True, timeout=TIMEOUT)
            answered = time.perf_counter() - begun
            done = await copy.run("md5sum </tmp/big; ls /tmp", check=True, timeout=TIMEOUT)
            assert done.stdout.split()[0] == checksum
            total = int((await copy.run("grep MemTotal /proc/meminfo", check=True)).stdout.split()[1])
            assert total << 10 > RAM * 0.9
        assert (await machine.run("[ -e /tmp/big ]", timeout=TIMEOUT)).status == 1
        size, name = snapshot.size / GIB, f"4 GB of RAM, backing {backing}"
        figure(f"{name}: size of the snapshot, pause of the save", f"{size:.2f} GB, {snapshot.pause:.2f} s")
        figure(f"{name}: until a copy runs, until it has answered", f"{runs:.2f} s, {answered:.2f} s")
        await snapshot.remove()


def need_space(folder: Path) -> None:
    """Skip the test if memory or disk are too small for the machine, its state and a copy."""
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable:"))
    if available < 3 * RAM or shutil.disk_usage("/dev/shm").free < RAM or shutil.disk_usage(folder).free < 4 * RAM:
        pytest.skip("there is too little memory or disk space for machines with 4 GB")


def make_content(path: Path) -> str:
    """Make a file that cannot be compressed. Returns the checksum of its beginning."""
    found = hashlib.md5(usedforsecurity=False)
    with path.open("wb") as file:
        for number in range(CACHED_SIZE // MIB):
            data = os.urandom(MIB)
            file.write(data)
            if number < FILE_SIZE // MIB:
                found.update(data)
    return found.hexdigest()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that a guest sees the size, serial number, path and content of all kinds of disks on all machine types."""

import asyncio
import hashlib
import itertools
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from tests.conftest import MIB
from tests.machines import Machine, Resources
from tests.shell import Booted, Shell, booted, qemu_for
from vmspawn import Disk
from vmspawn.storage.buses import NAMESPACE_SERIAL

pytestmark = pytest.mark.asyncio(loop_scope="module")

SECTOR = 512


#: virt is for the long tests only: guests of another architecture are ten times slower.
MACHINE_TYPES = ["q35", "pc", pytest.param("virt", marks=pytest.mark.soak)]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=MACHINE_TYPES)
async def guest(request: pytest.FixtureRequest, qemu: str) -> AsyncIterator[Booted]:
    async with booted(qemu_for(request.param, qemu), machine_type=request.param, hotplug_ports=8) as running:
        yield running


@dataclass
class Specimen:
    """A disk of one kind: its format, whether it is a block device of the host, and whether it is read-only."""

    number: int
    image_format: str
    block: bool
    read_only: bool
    path: Path
    fingerprint: str = ""
    device: str = ""

    @property
    def name(self) -> str:
        return f"disk{self.number}"

    @property
    def size(self) -> int:
        """A unique size, which identifies the disk in the guest's messages."""
        return (2 + self.number) * MIB

    @property
    def mark(self) -> bytes:
        return f"host {self.number}\n".encode()

    def fingerprint_now(self) -> str:
        return hashlib.sha256(self.path.read_bytes()[: 32 * MIB]).hexdigest()


async def run(*command: str) -> str:
    """Run a program on the host, and return its output."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return output.decode().strip()


@contextmanager
def detached_at_the_end() -> Iterator[list[str]]:
    """Yield a list for loop devices, which are detached at the end."""
    import subprocess

    loops: list[str] = []
    try:
        yield loops
    finally:
        for loop in loops:
            subprocess.run(["losetup", "--detach", loop], check=True)


async def make(specimen: Specimen, folder: Path, loops: list[str]) -> None:
    """Make the image with the mark in its first sector, behind a loop device if the disk is a block device."""
    content = folder / f"content{specimen.number}"
    content.write_bytes(specimen.mark.ljust(specimen.size, b"\0"))
    if specimen.block:
        host = folder / f"host{specimen.number}"
        host.write_bytes(b"")
        os.truncate(host, specimen.size if specimen.image_format == "raw" else 2 * specimen.size + MIB)
        loop = await run("losetup", "--find", "--show", str(host))
        loops.append(loop)
        specimen.path = Path(loop)
    flags = ["-n"] if specimen.block and specimen.image_format == "raw" else []
    await run("qemu-img", "convert", *flags, "-f", "raw", "-O", specimen.image_format, str(content), str(specimen.path))
    specimen.fingerprint = await asyncio.to_thread(specimen.fingerprint_now)


def specimens(bus: str, folder: Path) -> list[Specimen]:
    """Return a disk of each kind for a bus."""
    modes = [True] if bus == "scsi-cd" else [False, True]
    blocks = [False, True] if os.geteuid() == 0 and shutil.which("losetup") else [False]
    table = itertools.product(["raw", "qcow2"], blocks, modes)
    return [
        Specimen(number, image_format, block, read_only, folder / f"image{number}")
        for number, (image_format, block, read_only) in enumerate(table)
    ]


@pytest.mark.parametrize("bus", ["virtio-blk", "nvme", "nvme-ns", "virtio-scsi", "scsi-cd"])
async def test_every_kind_of_disk_is_attached_used_and_detached(guest: Booted, tmp_path: Path, bus: str) -> None:
    machine, shell = guest
    if bus == "nvme-ns" and not machine.storage._context.layout.namespaces.places:
        pytest.skip("this QEMU cannot plug in namespaces")
    table = specimens(bus, tmp_path)
    with detached_at_the_end() as loops:
        for specimen in table:
            await make(specimen, tmp_path, loops)
        before = await Resources.of(machine)
        await asyncio.gather(*(attach(machine, specimen, bus) for specimen in table))
        await recognise(shell, table, bus)
        for specimen in table:
            await use(machine, shell, specimen)
        await asyncio.gather(*(machine.detach(specimen.name) for specimen in table))
        went = {(await shell.wait_for(r"block (\S+) went"))[1] for _ in table}
        assert went == {specimen.device for specimen in table}
        assert await Resources.of(machine) == before
        for specimen in table:
            await check_content(specimen, tmp_path)


async def attach(machine: Machine, specimen: Specimen, bus: str) -> None:
    await machine.attach(
        Disk(str(specimen.path), specimen.name, bus, specimen.image_format, read_only=specimen.read_only)
    )


async def recognise(shell: Shell, table: list[Specimen], bus: str) -> None:
    """Wait until the guest has printed a line for each disk, and check the serial number and the mode."""
    by_size = {specimen.size: specimen for specimen in table}
    for _ in table:
        line = r"block (\S+) came: (\d+) bytes, serial (\S+), (read-write|read-only)\n"
        device, size, serial, mode = (await shell.wait_for(line)).groups()
        specimen = by_size.pop(int(size))
        specimen.device = device
        assert serial == (NAMESPACE_SERIAL if bus == "nvme-ns" else specimen.name)
        # Linux shows a read-only NVMe disk as writable.
        if not bus.startswith("nvme"):
            assert mode == ("read-only" if specimen.read_only else "read-write")


async def use(machine: Machine, shell: Shell, specimen: Specimen) -> None:
    """Check the stable path and the host's mark on the disk, and write the guest's mark if the disk is writable."""
    attached = next(each for each in machine.storage if each.name == specimen.name)
    assert await shell.run(f"readlink -f {attached.by_id}") == f"/dev/{specimen.device}"
    assert await shell.run(f"head -n 1 /dev/{specimen.device}") == specimen.mark.decode().strip()
    command = f"echo guest {specimen.number} | dd of=/dev/{specimen.device} bs=512 seek=1 conv=fsync,sync 2>/dev/null"
    await shell.run(f"! {command}" if specimen.read_only else command)


async def check_content(specimen: Specimen, folder: Path) -> None:
    """Check with qemu-img that the guest's writes are in the image, and that a read-only image is unchanged."""
    if specimen.read_only:
        assert await asyncio.to_thread(specimen.fingerprint_now) == specimen.fingerprint
        return
    copy = folder / "copy"
    source = ["-f", specimen.image_format, f"if={specimen.path}"]
    await run("qemu-img", "dd", "-O", "raw", "bs=512", "count=2", *source, f"of={copy}")
    content = copy.read_bytes()
    assert content.startswith(specimen.mark)
    assert content[SECTOR:].startswith(f"guest {specimen.number}\n".encode())

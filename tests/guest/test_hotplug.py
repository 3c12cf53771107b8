# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests a guest that gets disks by hot-plug, uses them and loses them."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.conftest import MIB, make_qcow2, make_raw
from tests.machines import event_named, unchanged
from tests.qemu.qmp_fixtures import scaled
from tests.shell import Booted, Shell, booted
from vmspawn import Disk
from vmspawn.errors import StoragePending
from vmspawn.storage.attached_disk import DETACHED_EVENT

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATTERN = b"written in the guest\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["q35", pytest.param("pc", marks=pytest.mark.soak)])
async def guest(request: pytest.FixtureRequest, qemu: str) -> AsyncIterator[Booted]:
    async with booted(qemu, machine_type=request.param, warm=True) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def nothing_left(guest: Booted) -> AsyncIterator[None]:
    """Check that each test leaves nothing behind in the machine."""
    async with unchanged(guest.machine):
        yield


async def seen_by_the_guest(shell: Shell, serial: str) -> tuple[str, int, str]:
    """Wait for the guest's message about a new disk, and return the disk's name, size and mode."""
    line = rf"vmspawn-guest: block (\S+) came: (\d+) bytes, serial {serial}, (read-write|read-only)"
    match = await shell.wait_for(line)
    return match[1], int(match[2]), match[3]


@pytest.mark.parametrize("bus", ["virtio-blk", "nvme", "virtio-scsi"])
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_a_disk_is_attached_written_and_detached(
    guest: Booted, tmp_path: Path, bus: str, image_format: str
) -> None:
    machine, shell = guest
    path = (make_raw if image_format == "raw" else make_qcow2)(tmp_path / f"disk-{bus}", 64 * MIB)
    attached = await machine.attach(Disk(str(path), bus=bus, format=image_format))
    name, size, mode = await seen_by_the_guest(shell, f"disk-{bus}")
    assert (size, mode) == (64 * MIB, "read-write")
    assert await shell.run(f"readlink -f {attached.by_id}") == f"/dev/{name}"
    await shell.run(f"echo written in the guest | dd of=/dev/{name} bs=512 conv=fsync,sync")
    await machine.detach(attached.name)
    await shell.wait_for(f"vmspawn-guest: block {name} went")
    assert await first_bytes(path, image_format) == PATTERN


async def first_bytes(path: Path, image_format: str) -> bytes:
    """Return the beginning of an image's content, read by qemu-img."""
    command = ["qemu-img", "dd", "-f", image_format, "-O", "raw", "bs=512", "count=1", f"if={path}", f"of={path}.out"]
    process = await asyncio.create_subprocess_exec(*command)
    assert await process.wait() == 0
    return await asyncio.to_thread(lambda: Path(f"{path}.out").read_bytes()[: len(PATTERN)])


@pytest.mark.parametrize("bus", ["virtio-blk", "nvme", "virtio-scsi"])
async def test_a_read_only_disk_cannot_be_written(guest: Booted, tmp_path: Path, bus: str) -> None:
    machine, shell = guest
    path = make_raw(tmp_path / "disk", 8 * MIB)
    path.write_bytes(b"from the host\n" + path.read_bytes()[14:])
    await machine.attach(Disk(str(path), bus=bus, read_only=True))
    name, size, mode = await seen_by_the_guest(shell, "disk")
    # QEMU's NVMe device does not report that it is read-only (docs/disks.md).
    assert (size, mode) == (8 * MIB, "read-write" if bus == "nvme" else "read-only")
    assert await shell.run(f"head -n 1 /dev/{name}") == "from the host"
    await shell.run(f"! dd if=/dev/urandom of=/dev/{name} bs=4096 count=1 conv=fsync 2>/dev/null")
    await machine.detach("disk")
    await shell.wait_for(f"vmspawn-guest: block {name} went")
    assert path.read_bytes()[:14] == b"from the host\n"


async def test_a_disk_with_a_long_name_has_a_hashed_serial(guest: Booted, tmp_path: Path) -> None:
    machine, shell = guest
    path = make_raw(tmp_path / "disk", 8 * MIB)
    attached = await machine.attach(Disk(str(path), "my disk"))
    # printf %s 'my disk' | sha256sum | cut -c1-20
    assert attached.serial == "514d464627a195887561"
    name, _, _ = await seen_by_the_guest(shell, attached.serial)
    assert await shell.run(f"readlink -f {attached.by_id}") == f"/dev/{name}"
    await machine.detach("my disk")


async def test_a_block_device_of_the_host_is_attached_and_written(guest: Booted, tmp_path: Path) -> None:
    machine, shell = guest
    path = make_raw(tmp_path / "backing", 8 * MIB)
    process = await asyncio.create_subprocess_exec(
        "losetup", "--find", "--show", str(path), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await process.communicate()
    if process.returncode != 0:
        pytest.skip(f"no loop device: {errors.decode().strip()}")
    loop = output.decode().strip()
    try:
        await machine.attach(Disk(loop, "disk", "virtio-blk"))
        name, size, _ = await seen_by_the_guest(shell, "disk")
        assert size == 8 * MIB
        await shell.run(f"echo written in the guest | dd of=/dev/{name} bs=512 conv=fsync,sync")
        await machine.detach("disk")
    finally:
        assert await (await asyncio.create_subprocess_exec("losetup", "--detach", loop)).wait() == 0
    assert path.read_bytes().startswith(PATTERN)


async def test_all_ports_can_be_used_again(guest: Booted, tmp_path: Path) -> None:
    """Eight disks use eight ports, twice. They are attached and detached in parallel."""
    machine, shell = guest
    for _ in range(2):
        names = [f"disk{n}" for n in range(8)]
        paths = {name: make_raw(tmp_path / name, MIB) for name in names}
        await asyncio.gather(*(machine.attach(Disk(str(paths[name]))) for name in names))
        came = [await shell.wait_for(r"block (\S+) came: 1048576 bytes, serial (disk\d)") for _ in names]
        assert {match[2] for match in came} == set(names)
        await asyncio.gather(*(machine.detach(name) for name in reversed(names)))
        went = [await shell.wait_for(r"block (\S+) went") for _ in names]
        assert {match[1] for match in went} == {match[1] for match in came}


async def test_a_paused_guest_releases_a_disk_once_it_runs_again(guest: Booted, tmp_path: Path) -> None:
    machine, shell = guest
    await machine.attach(Disk(str(make_raw(tmp_path / "disk", MIB))))
    await seen_by_the_guest(shell, "disk")
    await machine.pause()
    with pytest.raises(StoragePending, match="the guest is paused and cannot release disk"):
        await machine.detach("disk", timeout=0.2)
    late = asyncio.create_task(event_named(machine, DETACHED_EVENT))
    await asyncio.sleep(0)
    await machine.resume()
    assert await late == {"name": "disk"}
    await shell.wait_for("vmspawn-guest: block vda went")


@pytest.mark.scaled
async def test_cycles_over_all_buses_leave_nothing(guest: Booted, tmp_path: Path) -> None:
    machine, shell = guest
    path = str(make_raw(tmp_path / "disk", MIB))
    for _ in range(scaled(4)):
        for bus in ("virtio-blk", "nvme", "virtio-scsi"):
            await machine.attach(Disk(path, bus=bus))
            name, _, _ = await seen_by_the_guest(shell, "disk")
            await machine.detach("disk")
            await shell.wait_for(f"vmspawn-guest: block {name} went")

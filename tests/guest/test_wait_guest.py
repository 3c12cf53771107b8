# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that an attach that waits for the guest returns when the guest has the disk."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.conftest import MIB, make_raw
from tests.machines import unchanged
from tests.shell import Booted, booted
from vmspawn import Disk
from vmspawn.boot.qemu import find_qemu
from vmspawn.errors import ConfigNotSupported, Timeout

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guest(qemu: str) -> AsyncIterator[Booted]:
    async with booted(qemu, warm=True) as running:
        yield running


@pytest.mark.parametrize("bus", ["virtio-blk", "nvme", "nvme-ns", "virtio-scsi"])
async def test_the_guest_has_the_disk_when_the_attach_returns(
    guest: Booted, qemu: str, tmp_path: Path, bus: str
) -> None:
    machine, shell = guest
    if bus == "nvme-ns" and not find_qemu(qemu).has_namespaces:
        pytest.skip("this QEMU plugs no NVMe namespaces in while the machine runs")
    async with unchanged(machine):
        for size in (4 * MIB, 5 * MIB, 6 * MIB):
            await machine.attach(Disk(str(make_raw(tmp_path / "disk", size)), bus=bus), wait_guest=True)
            # The command in the guest does not wait, because the kernel knows the disk already.
            assert await shell.run(f"grep -c ' {size // 1024} ' /proc/partitions") == "1"
            await machine.detach("disk")


async def test_the_wait_for_a_paused_guest_times_out(guest: Booted, tmp_path: Path) -> None:
    machine, _ = guest
    await machine.pause()
    try:
        with pytest.raises(Timeout, match=r"has not used disk within 0\.2 s; the disk is attached"):
            await machine.attach(Disk(str(make_raw(tmp_path / "disk", MIB))), wait_guest=True, timeout=0.2)
        assert machine.disk("disk").has_device
    finally:
        await machine.resume()
    await machine.detach("disk")


async def test_the_wait_is_refused_for_an_optical_drive(guest: Booted, tmp_path: Path) -> None:
    machine, _ = guest
    with pytest.raises(ConfigNotSupported, match="cannot tell"):
        await machine.attach(Disk(str(make_raw(tmp_path / "cd", MIB)), bus="scsi-cd"), wait_guest=True)
    assert all(each.name != "cd" for each in machine.storage)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests disks that are resized, replaced, limited and detached by force while a guest writes to them."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.conftest import MIB, make_qcow2, make_raw
from tests.machines import Machine, Resources, event_named, unchanged
from tests.shell import Booted, Shell, booted
from vmspawn import Disk
from vmspawn.errors import ConfigNotSupported, StoragePending
from vmspawn.storage.attached_disk import DETACHED_EVENT, DETACHING_EVENT
from vmspawn.storage.limits import NO_LIMITS, Limits

pytestmark = pytest.mark.asyncio(loop_scope="module")

RESIZABLE = ("virtio-blk", "virtio-scsi")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guest(qemu: str) -> AsyncIterator[Booted]:
    async with booted(qemu, warm=True) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def nothing_left(guest: Booted) -> AsyncIterator[None]:
    """Check that each test leaves no disk behind."""
    async with unchanged(guest.machine):
        yield


async def attach(guest: Booted, path: Path, bus: str, **more: Any) -> str:
    """Attach a disk named `disk`. Returns the guest's name for it."""
    await guest.machine.attach(Disk(str(path), "disk", bus, **more))
    return (await guest.shell.wait_for(r"block (\S+) came"))[1]


async def detach(guest: Booted, device: str) -> None:
    await guest.machine.detach("disk")
    await guest.shell.wait_for(f"block {device} went")


#: Writes one sector through an open descriptor, because writing by name would create a file after the disk is gone.
WRITE = "echo line $i | dd of=/proc/self/fd/4 bs=512 seek=$i conv=fsync,sync 2>/dev/null"


async def start_writer(shell: Shell, device: str) -> None:
    """Start a writer in the guest that writes sector after sector, and prints a message when a write fails."""
    loop = f"i=0; while {WRITE}; do i=$(((i+1)%2048)); done"
    await shell.run(f"(exec 4<>/dev/{device}; {loop}; echo 'writer' 'ended') >/dev/console & true")


async def stop_writer(shell: Shell) -> None:
    await shell.run("kill $! && wait $! 2>/dev/null; true")


@pytest.mark.parametrize("bus", ["virtio-blk", "nvme", "virtio-scsi"])
async def test_an_image_is_replaced_under_a_writer(guest: Booted, tmp_path: Path, bus: str) -> None:
    machine, shell = guest
    old, new = make_raw(tmp_path / "old", 4 * MIB), make_qcow2(tmp_path / "new", 4 * MIB)
    device = await attach(guest, old, bus)
    await start_writer(shell, device)
    written = await wait_for_writes(machine, 5)
    await machine.replace("disk", str(new), format="qcow2")
    frozen = old.read_bytes()
    # The writer continues in the new image.
    await wait_for_writes(machine, written + 20)
    assert old.read_bytes() == frozen
    await stop_writer(shell)
    await detach(guest, device)
    content = await raw_content(new)
    assert content.count(b"line ") > 0


async def wait_for_writes(machine: Machine, count: int) -> int:
    """Wait until the guest has made `count` writes. No event reports writes, so this function polls QEMU."""
    async with asyncio.timeout(30):
        while (done := (await machine.storage.statistics())["disk"].writes) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return done


async def raw_content(image: Path) -> bytes:
    """Return the content of a qcow2 image, read by qemu-img."""
    command = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(image), f"{image}.raw"]
    assert await (await asyncio.create_subprocess_exec(*command)).wait() == 0
    return await asyncio.to_thread(Path(f"{image}.raw").read_bytes)


@pytest.mark.parametrize("bus", RESIZABLE)
async def test_the_guest_sees_another_size_at_once(guest: Booted, tmp_path: Path, bus: str) -> None:
    machine, shell = guest
    device = await attach(guest, make_raw(tmp_path / "image", 4 * MIB), bus)

    async def size_in_the_guest(size: int) -> int:
        """Return the size in the guest. Waits up to ten seconds until the guest has handled QEMU's interrupt."""
        seen = f"$(cat /sys/block/{device}/size)"
        waiting = f"n=0; until [ {seen} = {size // 512} ] || [ $((n += 1)) -gt 1000 ]; do usleep 10000; done"
        return int((await shell.run(f"{waiting}; echo {seen}")).split()[-1]) * 512

    await machine.resize("disk", 6 * MIB)
    assert await size_in_the_guest(6 * MIB) == 6 * MIB
    await machine.replace("disk", str(make_qcow2(tmp_path / "larger", 8 * MIB)), format="qcow2")
    assert await size_in_the_guest(8 * MIB) == 8 * MIB
    await detach(guest, device)


async def test_resizing_an_nvme_disk_is_refused_with_the_reason(guest: Booted, tmp_path: Path) -> None:
    device = await attach(guest, make_raw(tmp_path / "image", 4 * MIB), "nvme")
    with pytest.raises(ConfigNotSupported, match="bus nvme cannot change its size") as caught:
        await guest.machine.resize("disk", 8 * MIB)
    assert "detach it" in caught.value.hint
    await detach(guest, device)


@pytest.mark.parametrize("thread", [False, True])
async def test_limits_hold_a_writer_back_until_they_are_lifted(guest: Booted, tmp_path: Path, thread: bool) -> None:
    """A hundred writes would take most of a minute at the limit of two a second; removing the limit ends them."""
    machine, shell = guest
    device = await attach(guest, make_raw(tmp_path / "image", 4 * MIB), "virtio-blk", thread=thread)
    await machine.limit("disk", Limits(iops_write=2))
    loop = f"i=0; while [ $i -lt 100 ]; do {WRITE}; i=$((i+1)); done"
    await shell.run(f"(exec 4<>/dev/{device}; {loop}; echo 'writes' 'are done') >/dev/console & true")
    await wait_for_writes(machine, 3)
    assert (await machine.storage.statistics())["disk"].writes < 100
    await machine.limit("disk", NO_LIMITS)
    await shell.wait_for("writes are done")
    assert (await machine.storage.statistics())["disk"].writes >= 100
    await detach(guest, device)


@pytest.mark.parametrize("bus", ["virtio-blk", "nvme", "virtio-scsi"])
async def test_force_takes_the_image_from_a_writer(guest: Booted, tmp_path: Path, bus: str) -> None:
    machine, shell = guest
    image = make_raw(tmp_path / "image", 4 * MIB)
    device = await attach(guest, image, bus)
    await start_writer(shell, device)
    await wait_for_writes(machine, 5)
    await machine.detach("disk", timeout=0, force=True)
    frozen = image.read_bytes()
    if any(each.name == "disk" for each in machine.storage):
        await machine.detach("disk", timeout=60)
    # These two messages may come in either order.
    went, ended = f"block {device} went", "writer ended"
    await shell.wait_for(rf"{went}[\s\S]*{ended}|{ended}[\s\S]*{went}")
    assert image.read_bytes() == frozen


async def test_a_guest_that_removes_a_disk_itself_is_noticed(guest: Booted, tmp_path: Path) -> None:
    machine, shell = guest
    device = await attach(guest, make_raw(tmp_path / "image", 4 * MIB), "virtio-blk")
    gone = asyncio.create_task(event_named(machine, DETACHED_EVENT))
    await asyncio.sleep(0)
    await shell.run(
        f"address=$(basename $(readlink -f /sys/block/{device}/device/..)); "
        "for slot in /sys/bus/pci/slots/*; do "
        "[ $(cat $slot/address) != ${address%.*} ] || echo 0 >$slot/power; done"
    )
    assert await gone == {"name": "disk"}
    await shell.run(f"[ ! -e /sys/block/{device} ]")


async def test_a_guest_without_acpi_releases_a_disk_only_at_a_reset(qemu: str, tmp_path: Path) -> None:
    """The guest does not see the disk. Its removal is pending until a reset; force closes the image before that."""
    image = make_raw(tmp_path / "image", 4 * MIB)
    async with booted(qemu, kernel_arguments=("acpi=off",)) as (machine, _):
        before = await Resources.of(machine)
        await machine.attach(Disk(str(image), "disk"))
        asked = asyncio.create_task(event_named(machine, DETACHING_EVENT))
        await asyncio.sleep(0)
        with pytest.raises(StoragePending, match="the guest has not released disk") as caught:
            await machine.detach("disk", timeout=1.5)
        assert "force=True" in caught.value.hint
        said = await asked
        assert (said["name"], said["requests"]) == ("disk", 1)
        assert "has not released disk" in said["reason"]
        assert await machine.detach("disk", timeout=0, force=True) is False
        await machine.attach(Disk(str(image), "again", "virtio-scsi"))
        await machine.detach("again")
        late = asyncio.create_task(event_named(machine, DETACHED_EVENT))
        await asyncio.sleep(0)
        await machine.reboot()
        assert await late == {"name": "disk"}
        assert await Resources.of(machine) == before


async def test_a_removal_by_the_attention_button_completes_after_its_delay(qemu: str, tmp_path: Path) -> None:
    """Without ACPI hot-plug, the guest waits five seconds. QEMU refuses a second request; the first still succeeds."""
    native = ("-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off")
    async with booted(qemu, qemu_arguments=native) as (machine, shell):
        before = await Resources.of(machine)
        await machine.attach(Disk(str(make_raw(tmp_path / "image", MIB)), "disk"))
        await shell.wait_for(r"block (\S+) came")
        with pytest.raises(StoragePending, match="has not released disk"):
            await machine.detach("disk", timeout=2)
        removal = next(each for each in machine.storage if each.name == "disk").removal
        assert removal is not None
        assert removal.requests >= 2
        assert "already in the process of unplug" in removal.answer
        await machine.detach("disk", timeout=30)
        assert await Resources.of(machine) == before

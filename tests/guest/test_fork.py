# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests copies of a running guest from the inside: they begin at the state of the source, and are independent."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.conftest import MIB, make_qcow2, make_raw
from tests.copies import forked, inner, is_part_of_snapshot, snapshot_paths
from tests.figures import figure
from tests.guest.writing import RECORD, records_written, start_writer, stop_writer, verify
from tests.machines import fresh_name
from tests.qemu.qmp_fixtures import scaled
from tests.shell import Booted, Shell, booted, qemu_for
from vmspawn import Disk, Snapshot
from vmspawn.agent import protocol
from vmspawn.api import machine as api
from vmspawn.errors import ConfigNotSupported, NoFreePort, SnapshotBlocked, SnapshotInUse, StartError
from vmspawn.snapshots.save import save
from vmspawn.storage.limits import Limits

pytestmark = pytest.mark.asyncio(loop_scope="module")


#: The machine type, and the backing of the memory. Guests of another architecture are ten times slower.
MACHINES = [
    pytest.param(("q35", "anonymous"), id="q35"),
    *(
        pytest.param(each, id="-".join(each), marks=pytest.mark.soak)
        for each in (("pc", "anonymous"), ("virt", "anonymous"), ("q35", "file"), ("virt", "file"))
    ),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=MACHINES)
async def guest(request: pytest.FixtureRequest, qemu: str) -> AsyncIterator[Booted]:
    machine_type, backing = request.param
    async with booted(qemu_for(machine_type, qemu), machine_type=machine_type, ram_backing=backing) as running:
        yield running


@contextlib.asynccontextmanager
async def saved(guest: Booted, name: str = "") -> AsyncIterator[Snapshot]:
    """Take a snapshot, which is removed at the end."""
    snapshot = await guest.machine.snapshot(name)
    try:
        yield snapshot
    finally:
        await snapshot.remove()


async def test_a_copy_begins_in_the_state_of_the_source_and_is_independent(guest: Booted) -> None:
    await guest.shell.run("echo before >/tmp/mark")
    async with saved(guest) as snapshot:
        await guest.shell.run("echo source >/tmp/mark")
        async with forked(snapshot) as (copy, shell):
            assert await copy.status() == "running"
            assert await shell.run("cat /tmp/mark") == "before"
            await shell.run("echo copy >/tmp/mark")
        assert await guest.shell.run("cat /tmp/mark") == "source"


@pytest.mark.parametrize("bus", ["virtio-blk", "virtio-scsi"])
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_copies_share_the_image_of_a_hot_plugged_disk_and_each_writes_separately(
    guest: Booted, tmp_path: Path, bus: str, image_format: str
) -> None:
    name = fresh_name()
    path = (make_raw if image_format == "raw" else make_qcow2)(tmp_path / name, 64 * MIB)
    attached = await guest.machine.attach(Disk(str(path), bus=bus, format=image_format))
    await guest.shell.wait_for(rf"vmspawn-guest: block \S+ came: \d+ bytes, serial {name}")
    await write(guest.shell, attached.by_id, "shared", 0)
    async with saved(guest) as snapshot:
        before = path.read_bytes()
        await write(guest.shell, attached.by_id, "source", 1)
        async with forked(snapshot) as (copy, shell), forked(snapshot) as (_, other):
            assert await read(shell, attached.by_id, 0) == "shared"
            assert await read(shell, attached.by_id, 1) == ""
            await write(shell, attached.by_id, "copy", 1)
            assert await read(shell, attached.by_id, 1) == "copy"
            assert await read(other, attached.by_id, 1) == ""
            assert is_part_of_snapshot(path)
            await copy.detach(attached.name)
            await shell.wait_for("vmspawn-guest: block .* went")
        assert await read(guest.shell, attached.by_id, 1) == "source"
        assert path.read_bytes() == before
    await guest.machine.detach(attached.name)


async def write(shell: Shell, by_id: str, text: str, block: int) -> None:
    await shell.run(f"echo {text} | dd of={by_id} bs=4096 seek={block} conv=fsync,notrunc,sync 2>/dev/null")


async def read(shell: Shell, by_id: str, block: int) -> str:
    # Drop the guest's cache, which may differ from the disk.
    command = f"dd if={by_id} bs=4096 skip={block} count=1 2>/dev/null | tr -d '\\0'"
    return await shell.run(f"echo 3 >/proc/sys/vm/drop_caches; {command}")


async def test_disks_of_a_copy_can_be_attached_resized_limited_and_replaced(guest: Booted, tmp_path: Path) -> None:
    name = fresh_name()
    path = make_raw(tmp_path / name, 64 * MIB)
    await guest.machine.attach(Disk(str(path)))
    await guest.shell.wait_for(rf"serial {name}")
    async with saved(guest) as snapshot:
        async with forked(snapshot) as (copy, shell):
            assert await copy.resize(name, 128 * MIB) == 128 * MIB
            device = (await shell.run(f"readlink -f /dev/disk/by-id/virtio-{name}")).removeprefix("/dev/")
            assert int(await shell.run(f"cat /sys/class/block/{device}/size")) * 512 == 128 * MIB
            more = make_raw(tmp_path / fresh_name())
            await copy.attach(Disk(str(more), bus="virtio-scsi"))
            assert await copy.replace(name, str(make_raw(tmp_path / fresh_name(), 128 * MIB))) == 128 * MIB
            await copy.limit(name, Limits(iops=1000))
            assert next(each.limits.iops for each in await copy.disks() if each.disk.name == name) == 1000
            async with copy.qmp() as qmp:
                assert await qmp.execute("query-status")
            await copy.detach(more.name)
        assert next(each.size for each in await guest.machine.disks() if each.disk.name == name) == 64 * MIB
    await guest.machine.detach(name)


async def test_a_copy_can_be_copied(guest: Booted, tmp_path: Path) -> None:
    name = fresh_name()
    attached = await guest.machine.attach(Disk(str(make_raw(tmp_path / name))))
    await guest.shell.wait_for(rf"serial {name}")
    async with saved(guest) as first:
        async with forked(first) as (copy, shell):
            await write(shell, attached.by_id, "second", 3)
            second = await copy.snapshot()
            await write(shell, attached.by_id, "later", 3)
            with pytest.raises(SnapshotInUse):
                await first.remove()
        async with forked(second) as (_, shell):
            assert await read(shell, attached.by_id, 3) == "second"
        await second.remove()
    await guest.machine.detach(name)


async def test_a_command_continues_in_the_source_and_ends_in_the_copy(guest: Booted) -> None:
    """A copy keeps the idle ports, so that its first command needs no new ports."""
    await guest.machine.run("true", check=True)
    command = await guest.machine.execute(["sleep", "74322"])
    await until_a_set_is_idle(guest.machine)
    count = "ps -o args | grep -c '^sleep 74322' || true"
    async with saved(guest) as snapshot, snapshot.fork() as copy:
        (kept,) = idle_sets(copy)
        assert kept in idle_sets(guest.machine)
        assert {each.guest_name for each in copy._inside.commands._ports} == {
            protocol.port_name(kept, stream) for stream in protocol.PORTS
        }
        assert (await copy.run(count)).stdout == "0\n"
        async with snapshot.fork() as other:
            # The command in the first copy used the set of that copy. In the other copy the same set is still idle.
            assert idle_sets(other) == {kept}
    assert (await guest.machine.run(count)).stdout == "1\n"
    await command.close()


def idle_sets(machine: api.Machine) -> set[str]:
    """Return the ids of the sets of ports that no command uses."""
    return {each.id for each in machine._inside.commands._streams._idle}


async def until_a_set_is_idle(machine: api.Machine) -> None:
    async with asyncio.timeout(30):
        while not idle_sets(machine):  # noqa: ASYNC110 - no event reports it
            await asyncio.sleep(0.01)


async def test_a_paused_guest_stays_paused_and_its_copy_is_paused(guest: Booted) -> None:
    await guest.machine.pause()
    async with saved(guest) as snapshot:
        assert await guest.machine.status() == "paused"
        async with snapshot.fork() as copy:
            assert await copy.status() == "paused"
            await copy.resume()
            assert await copy.status() == "running"
    await guest.machine.resume()
    await guest.shell.run("true")


async def test_commands_of_sessions_and_changes_of_disks_wait_for_a_snapshot(guest: Booted, tmp_path: Path) -> None:
    path = make_raw(tmp_path / fresh_name())
    async with guest.machine.qmp() as qmp:
        saving = asyncio.create_task(guest.machine.snapshot())
        statuses = []
        while not saving.done():
            statuses.append(await qmp.execute("query-status"))
        snapshot = await saving
        assert {each["status"] for each in statuses} <= {"running"}
    mark = guest.machine.events.mark
    saving = asyncio.create_task(guest.machine.snapshot())
    await guest.machine.events.wait("STOP", since=mark, timeout=60)
    attached = await guest.machine.attach(Disk(str(path), bus="virtio-scsi"))
    await guest.machine.detach(attached.name)
    await (await saving).remove()
    await snapshot.remove()


async def test_an_object_that_cannot_be_saved_is_reported_before_the_guest_is_paused(
    guest: Booted, tmp_path: Path
) -> None:
    machine, before = guest.machine, snapshot_paths()
    path = make_raw(tmp_path / fresh_name())
    await machine.attach(Disk(str(path)))
    mark = machine.events.mark
    async with machine.qmp() as qmp:
        await qmp.execute("object-add", {"qom-type": "secret", "id": "theirs", "data": "x"})
        with pytest.raises(SnapshotBlocked, match="theirs"):
            await machine.snapshot()
        await qmp.execute("object-del", {"id": "theirs"})
        await machine.pause()
        await machine.events.wait("STOP", since=mark, timeout=60)
    stops = [each.name for each in machine.events.recent[mark - machine.events.mark :] if each.name == "STOP"]
    await machine.resume()
    assert stops == ["STOP"], "only the test has paused the machine"
    assert snapshot_paths() == before
    await machine.detach(path.name)


async def test_twenty_copies_run_at_once(guest: Booted) -> None:
    await guest.shell.run("echo twenty >/tmp/mark")
    async with saved(guest) as snapshot:

        async def one() -> str:
            async with forked(snapshot, fresh_name()) as (_, shell):
                return await shell.run("cat /tmp/mark")

        assert await asyncio.gather(*(one() for _ in range(20))) == ["twenty"] * 20
    assert inner(guest.machine).is_running


async def test_each_copy_has_its_own_random_numbers_and_the_hosts_time(guest: Booted) -> None:
    """The agent in the guest sets both."""
    await guest.shell.run("head -c 16 /dev/urandom >/dev/null")
    await guest.shell.run("date -s @1000000000")
    async with saved(guest) as snapshot, forked(snapshot) as (first, one), forked(snapshot) as (second, two):
        command = "head -c 16 /dev/urandom | od -An -tx1"
        numbers = [await shell.run(command) for shell in (one, two, guest.shell)]
        assert len(set(numbers)) == 3
        for copy in (first, second):
            assert copy._inside.is_clock_set
        assert abs(int(await one.run("date +%s")) - time.time()) < 60
        assert int(await guest.shell.run("date +%s")) < 1100000000


async def test_a_copy_with_a_new_identity_has_a_name_and_runs_its_hooks(guest: Booted) -> None:
    hooks = "/etc/vmspawn/fork.d"
    hook = f"mkdir -p {hooks}; printf '#!/bin/sh\\necho $1 >/tmp/hook\\n' >{hooks}/10-name; chmod +x {hooks}/10-name"
    await guest.shell.run(f"{hook}; echo old >/etc/machine-id; echo old >/etc/hostname")
    async with saved(guest) as snapshot:
        async with snapshot.fork("new_name", identity="new") as copy:
            found = await copy.run("hostname; cat /etc/hostname /tmp/hook /etc/machine-id", check=True)
            *names, machine_id = found.stdout.split()
            assert names == ["new-name"] * 3
            assert len(bytes.fromhex(machine_id)) == 16
        await guest.shell.run(f"echo exit 3 >>{hooks}/10-name")
        async with saved(guest) as second:
            with pytest.raises(StartError, match=r"a hook in /etc/vmspawn/fork.d failed"):
                await second.fork(identity="new").__aenter__()
    await guest.shell.run("rm -r /etc/vmspawn /etc/machine-id; [ $(hostname) = vmspawn ]; ! rm /tmp/hook")


#: The buses of writable disks. nvme-ns cannot be saved with any QEMU.
_BUSES = ("virtio-blk", "virtio-scsi", "nvme")


#: The number of snapshots with one disk. Each snapshot adds an overlay, so later snapshots take longer.
_SNAPSHOTS_OF_A_DISK = 20


@pytest.mark.scaled
@pytest.mark.parametrize(
    ("bus", "moments"),
    [
        ("virtio-blk", 2),
        *(pytest.param(bus, 10, marks=[pytest.mark.soak, pytest.mark.timeout(4 * 3600)]) for bus in _BUSES),
    ],
)
async def test_the_log_of_every_copy_is_whole(guest: Booted, tmp_path: Path, bus: str, moments: int) -> None:
    """The guest writes while it is saved at random moments: twice, in `./dev soak` 100 times on each bus."""
    for done in range(0, scaled(moments), _SNAPSHOTS_OF_A_DISK):
        await check_logs_of_copies(guest, tmp_path, bus, min(_SNAPSHOTS_OF_A_DISK, scaled(moments) - done))
    figure(f"{guest.machine.config.machine_type}, {bus}: whole logs of copies from random moments", scaled(moments))


async def check_logs_of_copies(guest: Booted, folder: Path, bus: str, moments: int) -> None:
    """Save the guest while it writes to a disk, and verify the log of a copy each time, and of the guest at the end."""
    path = make_raw(folder / fresh_name(), 64 * MIB)
    attached = await guest.machine.attach(Disk(str(path), bus=bus))
    if bus == "nvme" and (await inner(guest.machine).monitor.execute("query-migrate")).get("blocked-reasons"):
        await guest.shell.run(f"until [ -b {attached.by_id} ]; do usleep 10000; done")
        await guest.machine.detach(attached.name)
        pytest.skip("this QEMU cannot save an NVMe controller")
    await start_writer(guest.shell, attached.by_id)
    for number in range(moments):
        wanted = await records_written(guest.shell) + random.randint(0, 20)
        await guest.shell.run(f"until [ $(cat /tmp/count) -ge {wanted} ]; do usleep 1000; done")
        async with saved(guest) as snapshot, snapshot.fork() as copy:
            if number == 0:
                # After the first save, the guest writes to an overlay; the image has the earlier records.
                verify(path, wanted)
            assert await check_log(copy, attached.by_id, folder) >= wanted
    written = await stop_writer(guest.shell)
    assert await check_log(guest.machine, attached.by_id, folder) == written
    await guest.machine.detach(attached.name)


async def check_log(machine: api.Machine, device: str, folder: Path) -> int:
    """Stop the writer of a guest, and verify the records on its disk. Returns their number."""
    stop = ": >/tmp/stop; until [ -e /tmp/stopped ] || [ -e /tmp/failed ]; do usleep 10000; done; [ ! -e /tmp/failed ]"
    read = f"echo 3 >/proc/sys/vm/drop_caches; head -c $(($(cat /tmp/count) * {RECORD})) {device}"
    done = await machine.run(f"{stop} && {read}", text=False, check=True, timeout=60)
    log = folder / "log"
    await asyncio.to_thread(log.write_bytes, done.stdout)
    return verify(log, len(done.stdout) // RECORD)


async def test_disks_that_block_a_snapshot_are_detached_on_request(guest: Booted, tmp_path: Path) -> None:
    path = make_raw(tmp_path / fresh_name())
    try:
        await guest.machine.attach(Disk(str(path), bus="nvme-ns"))
    except (ConfigNotSupported, NoFreePort) as error:
        pytest.skip(f"this QEMU plugs in no namespaces: {error}")
    await guest.shell.wait_for("vmspawn-guest: block .* came")
    made = await asyncio.create_task(save(inner(guest.machine), detach_blocking=True))
    await guest.shell.wait_for("vmspawn-guest: block .* came")
    assert [each.disk.name for each in await guest.machine.disks()] == [path.name]
    snapshot = Snapshot(made.manifest.full_name, made.pause, 0)
    async with snapshot.fork() as copy:
        assert await copy.disks() == []
    await snapshot.remove()
    await guest.machine.detach(path.name)

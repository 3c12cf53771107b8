# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the library with machines that it starts, and with connections to machines by their control sockets."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

import vmspawn
from tests.callers import served_machine
from tests.commands import make_script
from tests.conftest import MIB, make_raw
from tests.machines import Machine, event_named, fresh_name, is_gone, process_is_gone
from vmspawn import Disk, Limits
from vmspawn.machine.ending import MACHINE_ENDED

DEADLINE = 60.0


@pytest_asyncio.fixture
async def machine(qemu: str, tmp_path: Path) -> AsyncIterator[Machine]:
    async with served_machine(qemu, tmp_path) as running:
        yield running


async def test_a_connection_attaches_changes_and_detaches_a_disk(machine: Machine, tmp_path: Path) -> None:
    async with vmspawn.connect(machine.name) as connected:
        disk = Disk(str(make_raw(tmp_path / "disk")), bus="virtio-scsi", limits=Limits(iops=500, burst=2))
        attached = await connected.attach(disk)
        assert (attached.name, attached.bus, attached.format, attached.read_only) == (
            "disk",
            "virtio-scsi",
            "raw",
            False,
        )
        assert await connected.disks() == await machine.disks()
        status = {each.disk.name: each for each in await connected.disks()}["disk"]
        assert (status.disk, status.size, status.path) == (attached, 64 * MIB, disk.path)
        assert status.limits == disk.limits
        await connected.limit("disk", Limits(bps=MIB))
        assert machine.disk("disk").limits == Limits(bps=MIB)
        assert await connected.replace("disk", str(make_raw(tmp_path / "other", 96 * MIB))) == 96 * MIB
        assert await connected.resize("disk", 128 * MIB) == 128 * MIB
        assert await connected.disks() == await machine.disks()
        assert await connected.detach("disk")
        assert [each.disk.name for each in await connected.disks()] == [each.name for each in machine.storage]


async def test_a_connection_changes_media(machine: Machine, tmp_path: Path) -> None:
    async with vmspawn.connect(machine.name) as connected:
        await connected.attach(Disk("", "cd", "scsi-cd"))
        medium = make_raw(tmp_path / "medium", MIB)
        await connected.insert_media("cd", str(medium))
        sizes = {each.disk.name: (each.size, each.path) for each in await connected.disks()}
        assert sizes["cd"] == (MIB, str(medium))
        await connected.eject_media("cd", force=True)
        assert {each.disk.name: each.size for each in await connected.disks()}["cd"] == 0


async def test_a_connection_raises_the_same_errors_as_a_started_machine(machine: Machine, tmp_path: Path) -> None:
    boot = next(each.name for each in machine.storage if each.is_boot)
    async with vmspawn.connect(machine.name) as connected:
        for control in (machine, connected):
            with pytest.raises(vmspawn.NoSuchStorage, match="there is no disk named nobody") as caught:
                await control.detach("nobody")
            assert caught.value.hint.startswith("its disks: ")
            with pytest.raises(vmspawn.StorageImmutable, match="is a boot disk"):
                await control.detach(boot)
            with pytest.raises(vmspawn.BadConfig, match="unknown bus 'floppy'"):
                await control.attach(Disk(str(make_raw(tmp_path / "disk")), bus="floppy"))
        async with connected.qmp() as qmp:
            with pytest.raises(vmspawn.QmpError, match="QEMU refused nonsense"):
                await qmp.execute("nonsense")


async def test_a_connection_changes_the_run_state_and_reports_the_end(machine: Machine) -> None:
    async with vmspawn.connect(machine.name) as connected, connected.events() as events:
        waiting = asyncio.create_task(connected.wait())
        await connected.pause()
        assert (await anext(events)).name == "STOP"
        assert await connected.status() == await machine.status() == "paused"
        await connected.resume()
        assert (await anext(events)).name == "RESUME"
        reset = asyncio.create_task(event_named(machine, "RESET"))
        await asyncio.sleep(0)
        await connected.reboot()
        await reset
        await connected.power_off()
        async with connected.qmp(read_only=True) as qmp:
            answer = await qmp.execute("query-status")
            assert isinstance(answer, dict)
            assert answer["status"] == "running"
        await connected.terminate()
        end = await waiting
        assert end == await machine.wait()
        assert (end.reason, end.clean) == ("host-qmp-quit", True)
        names = [event.name async for event in events]
        assert names[-1] == MACHINE_ENDED


async def test_a_connection_to_a_machine_that_does_not_exist_fails() -> None:
    with pytest.raises(vmspawn.NotConnected, match="there is no machine named nobody"):
        async with vmspawn.connect("nobody"):
            pass


async def test_a_disk_may_be_a_path_and_a_size_may_be_a_string(machine: Machine, tmp_path: Path) -> None:
    async with vmspawn.connect(machine.name) as connected:
        await connected.attach(make_raw(tmp_path / "first"), bus="virtio-scsi", name="data")
        await machine.attach(str(make_raw(tmp_path / "second")), bus="virtio-scsi", read_only=True)
        found = {each.disk.name: (each.disk.bus, each.disk.read_only) for each in await connected.disks()}
        assert (found["data"], found["second"]) == (("virtio-scsi", False), ("virtio-scsi", True))
        assert await connected.resize("data", "96M") == await machine.resize("data", "96M") == 96 * MIB
        for control in (machine, connected):
            with pytest.raises(vmspawn.UsageError, match="size='much' is not a size"):
                await control.resize("data", "much")
            with pytest.raises(
                TypeError, match=r"attach\(\) got an unexpected keyword argument 'buss'; did you mean 'bus'"
            ):
                await control.attach(tmp_path / "first", buss="nvme")  # type: ignore[call-arg]


async def test_a_wait_finds_events_that_came_before_it(machine: Machine) -> None:
    async with vmspawn.connect(machine.name) as connected:
        for control in (machine, connected):
            mark = control.events.mark
            await control.pause()
            await control.resume()
            await control.events.wait("STOP", since=mark, timeout=DEADLINE)
            await control.events.wait("RESUME", since=mark, timeout=DEADLINE)
        await connected.terminate()
        for control in (machine, connected):
            end = await control.events.wait("MachineEnded", since=0, timeout=DEADLINE)
            assert end.data == (await machine.wait())._asdict()
            with pytest.raises(vmspawn.MachineEnded, match=f"machine {machine.name} ended before RESET came"):
                await control.events.wait("RESET", timeout=DEADLINE)


async def test_a_native_console_cannot_be_read(qemu: str, tmp_path: Path) -> None:
    async with served_machine(qemu, tmp_path, console="native", qemu_arguments=("-monitor", "none")) as machine:
        async with vmspawn.connect(machine.name) as connected:
            with pytest.raises(vmspawn.NotSupported, match="shares no console"):
                _ = connected.console
        with pytest.raises(vmspawn.NotSupported, match="QEMU's own"):
            vmspawn.Machine.console.fget(machine)  # type: ignore[attr-defined]


async def test_the_console_and_the_events_end_with_the_connection(machine: Machine) -> None:
    async with vmspawn.connect(machine.name) as connected:
        console = connected.console
        events = connected.events
    with pytest.raises(vmspawn.MachineEnded):
        await console.send("x")
    with pytest.raises(vmspawn.NotConnected, match="was closed before STOP came"):
        await events.wait("STOP")
    assert await machine.status() == "running"


# Starts.


async def test_a_start_that_is_cancelled_while_qemu_is_probed_leaves_nothing(tmp_path: Path) -> None:
    """QEMU never answers. The loop runs meanwhile, and the process is gone after the cancellation."""
    fifo = tmp_path / "pid"
    os.mkfifo(fifo)
    script = make_script(tmp_path / "qemu-system-x86_64", f"echo $$ > {fifo}; exec sleep 1000")
    name = fresh_name()
    machine = vmspawn.Machine(image=str(make_raw(tmp_path / "boot", MIB)), name=name, qemu=str(script))
    task = asyncio.create_task(machine.__aenter__())
    async with asyncio.timeout(DEADLINE):
        pid = int(await asyncio.to_thread(fifo.read_text))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert process_is_gone(pid)
    assert is_gone(name)


@pytest.mark.parametrize("turns", [0, 1, 2, 5, 20, 100])
async def test_a_start_that_is_cancelled_later_leaves_nothing(qemu: str, tmp_path: Path, turns: int) -> None:
    """The start is cancelled some turns of the loop after the first moment at which there is something to undo."""
    name = fresh_name()
    machine = vmspawn.Machine(
        image=str(make_raw(tmp_path / "boot", MIB)), name=name, qemu=qemu, ram=64 * MIB, console="headless"
    )
    files = len(os.listdir("/proc/self/fd"))
    task = asyncio.create_task(machine.__aenter__())
    async with asyncio.timeout(DEADLINE):
        while is_gone(name):  # noqa: ASYNC110 - the test needs each turn of the loop
            await asyncio.sleep(0)
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            pass
        else:
            await machine.__aexit__()
    assert is_gone(name)
    assert len(os.listdir("/proc/self/fd")) <= files
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)  # noqa: ASYNC222 - it does not block


async def test_machines_start_side_by_side(qemu: str, tmp_path: Path) -> None:
    """Attributes of the process, for example its umask, do not change."""
    mask = os.umask(0o22)
    os.umask(mask)

    async def live(number: int) -> None:
        image = str(make_raw(tmp_path / f"boot{number}", MIB))
        async with vmspawn.Machine(image=image, name=fresh_name(), qemu=qemu, ram=64 * MIB) as machine:
            assert await machine.status() == "running"

    await asyncio.gather(*map(live, range(4)))
    assert os.umask(mask) == mask


async def test_a_machine_that_does_not_run_refuses_calls(qemu: str, tmp_path: Path) -> None:
    machine = vmspawn.Machine(image=str(make_raw(tmp_path / "boot", MIB)), name="asleep", qemu=qemu)
    assert machine.name == "asleep"
    with pytest.raises(vmspawn.NotConnected, match="machine asleep does not run"):
        await machine.status()

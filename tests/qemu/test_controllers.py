# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests controllers that are plugged in for the first disk, and controllers that are removed while they have disks."""

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_raw
from tests.machines import Machine, Resources, idle_machine
from tests.qemu.bare_qemu import bare
from vmspawn import Disk
from vmspawn.boot.qemu import find_qemu
from vmspawn.errors import BadConfig, NoFreePort, QmpError, StoragePending, SystemFailure
from vmspawn.host import runtime
from vmspawn.hotplug.attachment import State
from vmspawn.qmp.monitor import Command, Monitor

DEADLINE = 60.0

#: The commands that save the device state.
SAVES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("migrate", {"uri": "unix:/proc/nonexistent"}),
    ("snapshot-save", {"job-id": "job", "tag": "tag", "vmstate": "none", "devices": []}),
    ("xen-save-devices-state", {"filename": "/proc/nonexistent/state"}),
    ("human-monitor-command", {"command-line": "migrate -d unix:/proc/nonexistent"}),
    ("human-monitor-command", {"command-line": " savevm tag"}),
)


@pytest.fixture
def namespaces(qemu: str) -> str:
    """Return a QEMU that can plug in namespaces."""
    if not find_qemu(qemu).has_namespaces:
        pytest.skip("this QEMU plugs no NVMe namespaces in while the machine runs")
    return qemu


async def attach(machine: Machine, folder: Path, name: str, bus: str, **options: Any) -> None:
    await machine.attach(Disk(str(make_raw(folder / name, 1 << 20)), bus=bus, **options))


async def devices(machine: Machine) -> set[str]:
    return {each["name"] for each in await machine.monitor.execute("qom-list", {"path": "/machine/peripheral"})}


async def until_gone(machine: Machine, device: str) -> None:
    """Reset the machine until QEMU removes a device whose removal was requested: firmware releases none."""
    async with asyncio.timeout(DEADLINE):
        with machine.events() as events:
            while device in await devices(machine):
                await machine.reboot()
                async for event in events:
                    data = event.data or {}
                    if data.get("device") == device or (event.name == "RESET" and not data.get("guest")):
                        break


async def _pause() -> None:
    """Leave QEMU alone for a moment: nothing reports that a port is free."""
    await asyncio.sleep(0.01)


async def until_free(machine: Machine, ports: int) -> None:
    """Wait until this number of ports is free."""
    async with asyncio.timeout(DEADLINE):
        while machine.storage.ports_free != ports:
            await _pause()


async def save(session: Monitor, path: Path) -> str:
    """Save the state to a socket; returns the migration's final status."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        reading = asyncio.create_task(asyncio.to_thread(read_all, listening))
        with session.events() as events:
            enabled = {"capability": "events", "state": True}
            await session.execute("migrate-set-capabilities", {"capabilities": [enabled]})
            await session.execute("migrate", {"uri": f"unix:{path}"})
            async for event in events:
                status = str((event.data or {}).get("status"))
                if event.name == "MIGRATION" and status in ("completed", "failed"):
                    await reading
                    return status
    raise AssertionError("QEMU ended")


def read_all(listening: socket.socket) -> None:
    connected, _ = listening.accept()
    with connected:
        while connected.recv(1 << 20):
            pass


@asynccontextmanager
async def left_and_adopted(machine: Machine) -> AsyncIterator[Machine]:
    """Run the machine under another manager, which releases it at the end."""
    name = machine.name
    await machine.leave()
    adopted = await Machine.adopt(name)
    try:
        yield adopted
    finally:
        await adopted.leave()


# The controller of namespaces.


async def test_a_machine_can_be_saved(qemu: str, tmp_path: Path) -> None:
    async with idle_machine(qemu, tmp_path) as machine, machine.qmp() as session, asyncio.timeout(DEADLINE):
        assert await save(session, tmp_path / "socket") == "completed"


async def test_the_controller_comes_with_the_first_namespace_and_goes_with_the_last(
    namespaces: str, tmp_path: Path
) -> None:
    async with idle_machine(namespaces, tmp_path) as machine, machine.qmp() as session, asyncio.timeout(2 * DEADLINE):
        before = await Resources.of(machine)
        assert "nvme0" not in before.pci_devices
        await attach(machine, tmp_path, "one", "nvme-ns")
        await attach(machine, tmp_path, "two", "nvme-ns")
        assert machine.storage.ports_free == before.ports_free - 1
        await machine.detach("one")
        assert "nvme0" in await devices(machine)
        await machine.detach("two")
        await until_gone(machine, "nvme0")
        await until_free(machine, before.ports_free)
        assert await Resources.of(machine) == before
        assert await save(session, tmp_path / "socket") == "completed"


async def test_a_refused_namespace_brings_no_controller(namespaces: str, tmp_path: Path) -> None:
    async with idle_machine(namespaces, tmp_path) as machine:
        with pytest.raises(BadConfig):
            await attach(machine, tmp_path, "one", "nvme-ns", serial="SERIAL")
        assert "nvme0" not in await devices(machine)


async def test_a_failed_namespace_unplugs_the_controller(namespaces: str, tmp_path: Path) -> None:
    image = make_raw(tmp_path / "used", 1 << 20)
    with bare(namespaces, "pc", "-blockdev", f"file,node-name=n,filename={image}", "-device", "scsi-hd,drive=n"):
        async with idle_machine(namespaces, tmp_path) as machine:
            free = machine.storage.ports_free
            with pytest.raises(SystemFailure, match="uses the image"):
                await machine.attach(Disk(str(image), bus="nvme-ns"))
            await until_gone(machine, "nvme0")
            await until_free(machine, free)


async def test_no_disk_has_the_serial_number_of_the_controller(namespaces: str, tmp_path: Path) -> None:
    """The guest rejects the second of two NVMe controllers with one serial number."""
    async with idle_machine(namespaces, tmp_path) as machine:
        with pytest.raises(BadConfig, match="serial number vmspawn belongs to the controller"):
            await attach(machine, tmp_path, "vmspawn", "nvme")


async def test_the_controller_needs_a_port(namespaces: str, tmp_path: Path) -> None:
    async with idle_machine(namespaces, tmp_path, hotplug_ports=1) as machine:
        await attach(machine, tmp_path, "one", "virtio-blk")
        with pytest.raises(NoFreePort, match="cannot attach two on bus nvme-ns: no free hot-plug port") as caught:
            await attach(machine, tmp_path, "two", "nvme-ns")
        assert "needs a port for its controller" in caught.value.hint


async def test_many_namespaces_at_once_share_one_controller(namespaces: str, tmp_path: Path) -> None:
    async with idle_machine(namespaces, tmp_path) as machine:
        free = machine.storage.ports_free
        await asyncio.gather(*(attach(machine, tmp_path, f"disk{n}", "nvme-ns") for n in range(8)))
        assert machine.storage.ports_free == free - 1


@pytest.mark.parametrize("machine_type", ["q35", "pc"])
async def test_a_namespace_from_boot_has_its_controller_from_boot(
    namespaces: str, tmp_path: Path, machine_type: str
) -> None:
    disk = Disk(str(make_raw(tmp_path / "boot", 1 << 20)), bus="nvme-ns")
    async with idle_machine(namespaces, tmp_path, machine_type=machine_type, extra_disks=(disk,)) as machine:
        free = machine.storage.ports_free
        await attach(machine, tmp_path, "one", "nvme-ns")
        await machine.detach("one")
        assert machine.storage.ports_free == free
        assert "nvme0" in await devices(machine)
        async with left_and_adopted(machine) as adopted:
            await attach(adopted, tmp_path, "two", "nvme-ns")
            await adopted.detach("two")
            assert "nvme0" in await devices(adopted)
            assert adopted.storage.ports_free == free
        await (await Machine.adopt(machine.name)).close()


async def test_a_controller_from_boot_without_a_record_is_adopted(namespaces: str, tmp_path: Path) -> None:
    """Managers of older versions started every QEMU with that controller."""
    device = {"driver": "nvme", "id": "nvme0", "serial": "vmspawn", "bus": "pcie.0", "addr": "0x4"}
    machine = idle_machine(namespaces, tmp_path, qemu_arguments=("-device", json.dumps(device)))
    async with machine:
        async with left_and_adopted(machine) as adopted:
            free = adopted.storage.ports_free
            await attach(adopted, tmp_path, "one", "nvme-ns")
            await adopted.detach("one")
            assert adopted.storage.ports_free == free
            assert "nvme0" in await devices(adopted)
            async with adopted.qmp() as session:
                await check_refusals(session)
        await (await Machine.adopt(machine.name)).close()


async def test_an_adopted_controller_goes_with_the_last_namespace(namespaces: str, tmp_path: Path) -> None:
    async with idle_machine(namespaces, tmp_path) as machine:
        free = machine.storage.ports_free
        await attach(machine, tmp_path, "one", "nvme-ns")
        async with left_and_adopted(machine) as adopted:
            assert adopted.storage.ports_free == free - 1
            await adopted.detach("one")
            await until_gone(adopted, "nvme0")
            await until_free(adopted, free)
        await (await Machine.adopt(machine.name)).close()


@pytest.mark.parametrize("is_adopted", [False, True])
async def test_namespaces_go_with_their_controller(namespaces: str, tmp_path: Path, is_adopted: bool) -> None:
    """QEMU keeps namespaces after the guest has ejected their controller."""
    async with idle_machine(namespaces, tmp_path) as machine:
        before = await Resources.of(machine)
        await attach(machine, tmp_path, "one", "nvme-ns")
        if not is_adopted:
            async with machine.qmp() as session:
                await session.execute("device_del", {"id": "nvme0"})
            await until_gone(machine, "nvme0")
            await until_free(machine, before.ports_free)
            await until_detached(machine, "one")
            assert await Resources.of(machine) == before
            await attach(machine, tmp_path, "one", "nvme-ns")
            return
        await machine.leave()
        with socket.socket(socket.AF_UNIX) as connected:
            connected.connect(os.path.join(runtime.runtime_root(), machine.name, runtime.MONITORS[0]))
            monitor = Monitor(connected)
            await monitor.greeting()
            await monitor.execute("device_del", {"id": "nvme0"})
            with monitor.events() as events:
                await monitor.execute("system_reset")
                async for event in events:
                    if event.name == "DEVICE_DELETED":
                        break
            monitor.close()
        adopted = await Machine.adopt(machine.name)
        try:
            await until_detached(adopted, "one")
        finally:
            await adopted.close()


async def until_detached(machine: Machine, name: str) -> None:
    """Reset the machine until QEMU reports a removed device: QEMU 7.2 sometimes does so only after a reset."""
    async with asyncio.timeout(DEADLINE):
        while any(each.name == name for each in machine.storage):
            await machine.reboot()
            for _ in range(50):
                await _pause()


async def test_unplugging_a_pci_disk_keeps_the_others(qemu: str, tmp_path: Path) -> None:
    """QEMU reports the removal of a virtio-blk device twice, first without the device's name."""
    async with idle_machine(qemu, tmp_path) as machine:
        await attach(machine, tmp_path, "one", "virtio-blk")
        await attach(machine, tmp_path, "two", "virtio-blk")
        device = machine.disk("one").device
        with pytest.raises(StoragePending):
            await machine.detach("one", timeout=0.1)
        await until_gone(machine, device)
        await until_detached(machine, "one")
        assert {each.state for each in machine.storage} == {State.ATTACHED}


# Saves of the state.


async def check_refusals(session: Monitor) -> None:
    """Check that a session refuses each way to save the state, and that QEMU survives."""
    for command, arguments in SAVES:
        with pytest.raises(QmpError, match=f"command {command} is refused: QEMU crashes.*nvme"):
            await session.execute(command, arguments)
    assert (await session.execute("query-status"))["status"]


async def test_a_session_refuses_saves_that_would_crash_qemu(namespaces: str, tmp_path: Path) -> None:
    async with idle_machine(namespaces, tmp_path) as machine, machine.qmp() as session:
        await attach(machine, tmp_path, "one", "nvme-ns")
        await check_refusals(session)
        await session.execute("human-monitor-command", {"command-line": "info version"})


async def test_a_session_refuses_saves_with_a_clients_controller(namespaces: str, tmp_path: Path) -> None:
    async with idle_machine(namespaces, tmp_path) as machine, machine.qmp() as session:
        await session.execute("device_add", {"driver": "nvme", "serial": "other", "bus": "port3", "addr": "0x0"})
        await check_refusals(session)


async def test_a_session_passes_other_saves_to_qemu(qemu: str, tmp_path: Path) -> None:
    """A controller with its own drive is saved, or refused by QEMU."""
    async with idle_machine(qemu, tmp_path) as machine, machine.qmp() as session:
        await attach(machine, tmp_path, "one", "nvme")
        for command, arguments in SAVES:
            (found,) = await session.execute_all([Command(command, arguments)])
            assert "is refused" not in str(found)


# SCSI controllers that are removed.


@pytest.mark.parametrize(
    ("machine_type", "thread"), [("pc", False), ("pc", True), ("q35", True)], ids=["first", "threaded", "threaded-q35"]
)
async def test_a_removed_scsi_controller_is_plugged_in_again(
    qemu: str, tmp_path: Path, machine_type: str, thread: bool
) -> None:
    """On pc, a guest can eject the first controller too. The test also removes the controller that was plugged in."""
    controller = "scsi1" if thread else "scsi0"
    async with idle_machine(qemu, tmp_path, machine_type=machine_type) as machine, machine.qmp() as session:
        before = await Resources.of(machine)
        for name in ("one", "two"):
            await attach(machine, tmp_path, name, "virtio-scsi", thread=thread)
            assert controller in await devices(machine)
            assert machine.storage.ports_free == before.ports_free - thread
            await session.execute("device_del", {"id": controller})
            await until_gone(machine, controller)
            await until_detached(machine, name)
            await until_free(machine, before.ports_free)
            without_controller = replace(before, pci_devices=before.pci_devices - {controller})
            assert await Resources.of(machine) == without_controller


async def test_a_removed_scsi_controller_is_plugged_in_again_after_an_adoption(qemu: str, tmp_path: Path) -> None:
    async with idle_machine(qemu, tmp_path, machine_type="pc") as machine:
        async with machine.qmp() as session:
            await session.execute("device_del", {"id": "scsi0"})
        await until_gone(machine, "scsi0")
        async with left_and_adopted(machine) as adopted:
            assert "scsi0" not in await devices(adopted)
            await attach(adopted, tmp_path, "one", "virtio-scsi")
            assert "scsi0" in await devices(adopted)
        await (await Machine.adopt(machine.name)).close()

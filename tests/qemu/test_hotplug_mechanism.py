# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests hot-plug without disks: with virtio-serial ports, on a bare QEMU."""

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from tests.commands import DEADLINE
from tests.machines import fresh_name, links_of
from tests.ports import CONTROLLER, GUEST_NAME, Manager, managed
from vmspawn.errors import NoFreePort, QmpError
from vmspawn.host import runtime
from vmspawn.host.runtime import MachineDirectory
from vmspawn.hotplug.attachment import State

#: More points at which a manager can die (tests/ports.py) than any operation has.
POINTS_MAX = 40


@pytest.fixture
def bare(qemu: str) -> Iterator[tuple[str, int]]:
    """Start a QEMU whose guest is its firmware, with a controller for ports; yields its name and process id."""
    name = fresh_name()
    directory = MachineDirectory.create(name)
    directory.write(runtime.STATE, b"{}")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(directory.socket_address("qmp-manager"))
        listener.listen(4)
        options = ["-machine", "q35,accel=tcg", "-m", "32M", "-nodefaults", "-no-user-config", "-display", "none"]
        controller = ["-device", f"virtio-serial-pci,id={CONTROLLER},max_ports=4"]
        monitor = ["-chardev", f"socket,id=m,fd={listener.fileno()},server=on,wait=off", "-mon", "m,mode=control"]
        process = subprocess.Popen([qemu, *options, *controller, *monitor], pass_fds=[listener.fileno()])
    directory.close()
    try:
        yield name, process.pid
    finally:
        process.kill()
        process.wait()
        MachineDirectory.take_over(name).remove()


@pytest_asyncio.fixture
async def manager(bare: tuple[str, int]) -> AsyncIterator[Manager]:
    async with managed(bare[0]) as manager:
        yield manager


async def check_clean(manager: Manager) -> None:
    """Check that QEMU has no remains of ports, and that all places are free."""
    assert await manager.seen() == (set(), set())
    assert not list(manager.ports)
    assert manager.ports._pool.is_unused
    for number in range(POINTS_MAX):
        with pytest.raises(QmpError, match="not found"):
            await manager.monitor.execute("closefd", {"fdname": f"stream{number}"})


async def wait_until_clean(manager: Manager) -> None:
    async with asyncio.timeout(DEADLINE):
        while unwinding := [port.unwinding for port in manager.ports if port.unwinding is not None]:
            await asyncio.wait(unwinding)
    await check_clean(manager)


async def test_a_port_is_attached_and_detached(manager: Manager, bare: tuple[str, int]) -> None:
    before = len(links_of(bare[1]))
    port = await manager.ports.attach(GUEST_NAME)
    assert port.state is State.ATTACHED
    assert await manager.seen() == ({port.device}, {port.device})
    name = await manager.monitor.execute("qom-get", {"path": f"/machine/peripheral/{port.device}", "property": "name"})
    assert name == GUEST_NAME
    assert await manager.ports.detach(port)
    await check_clean(manager)
    assert len(links_of(bare[1])) == before


@pytest.mark.parametrize("way", ["disconnect", "detach"])
async def test_streams_are_closed_by_a_disconnect_or_a_detach(
    manager: Manager, bare: tuple[str, int], way: str
) -> None:
    before = len(links_of(bare[1]))
    ports = [await manager.ports.attach(name) for name in (GUEST_NAME, "another")]
    for _ in range(3):
        streams = await manager.ports.connect(ports)
        assert len(links_of(bare[1])) == before + 2
        if way == "detach":
            for port in ports:
                assert await manager.ports.detach(port)
            ports = [await manager.ports.attach(name) for name in (GUEST_NAME, "another")]
        else:
            await manager.ports.disconnect(ports)
        for stream in streams:
            stream.theirs.close()
            # QEMU has closed its end.
            stream.ours.settimeout(DEADLINE)
            assert stream.ours.recv(1) == b""
            stream.close()
        assert len(links_of(bare[1])) == before
    for port in ports:
        assert await manager.ports.detach(port)
    await check_clean(manager)


async def test_a_detached_port_cannot_be_connected(manager: Manager, bare: tuple[str, int]) -> None:
    before = len(links_of(bare[1]))
    port = await manager.ports.attach(GUEST_NAME)
    assert await manager.ports.detach(port)
    with pytest.raises(QmpError):
        await manager.ports.connect([port])
    await check_clean(manager)
    assert len(links_of(bare[1])) == before


async def test_a_refused_port_leaves_nothing_behind(manager: Manager) -> None:
    # Another client has made a character device with the name that vmspawn will use next.
    await manager.monitor.execute("chardev-add", {"id": "stream0", "backend": {"type": "null", "data": {}}})
    with pytest.raises(QmpError, match="chardev-add"):
        await manager.ports.attach(GUEST_NAME)
    # When vmspawn undoes the attach, it removes the other client's device too, because the names are the same.
    await wait_until_clean(manager)
    one = await manager.ports.attach(GUEST_NAME)
    with pytest.raises(QmpError, match="A port already exists by name"):
        await manager.ports.attach(GUEST_NAME)
    both = [one, await manager.ports.attach("another")]
    with pytest.raises(NoFreePort, match="no free virtio-serial port"):
        await manager.ports.attach(GUEST_NAME)
    for port in both:
        assert await manager.ports.detach(port)
    await check_clean(manager)


async def test_a_port_that_a_client_unplugs_leaves_nothing_behind(manager: Manager) -> None:
    port = await manager.ports.attach(GUEST_NAME)
    await manager.monitor.execute("device_del", {"id": port.device})
    async with asyncio.timeout(DEADLINE):
        await port.gone.wait()
    await wait_until_clean(manager)


async def test_a_cancelled_attach_leaves_nothing_behind(manager: Manager) -> None:
    task = asyncio.create_task(manager.ports.attach(GUEST_NAME))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await wait_until_clean(manager)


@pytest.mark.parametrize("operation", ["attach", "connect", "detach"])
async def test_a_port_is_complete_or_absent_wherever_the_manager_dies(bare: tuple[str, int], operation: str) -> None:
    name, _ = bare
    outcomes = set()
    for point in range(1, POINTS_MAX):
        if operation != "attach":
            async with managed(name) as manager:
                await manager.ports.attach(GUEST_NAME)
        outcome = await asyncio.to_thread(run_and_die, name, operation, point)
        async with managed(name) as manager:
            # The port is complete, or nothing of it is left.
            for port in list(manager.ports):
                if port.unwinding is None:
                    assert port.state is State.ATTACHED
                    assert await manager.seen() == ({port.device}, {port.device})
                    outcomes.add("whole")
                    assert await manager.ports.detach(port)
                else:
                    outcomes.add("undone")
            await wait_until_clean(manager)
        if outcome == "finished":
            assert outcomes == ({"whole"} if operation == "connect" else {"whole", "undone"})
            return
        assert outcome == "died"
    raise AssertionError(f"{operation} has more than {POINTS_MAX - 1} points")


def run_and_die(name: str, operation: str, point: int) -> str:
    """Do an operation in a manager that dies at a point. Returns `died` or `finished`."""
    command = [sys.executable, "-m", "tests.ports", name, operation, str(point)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=DEADLINE).stdout.strip()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the manager's monitor: commands sent together, their order, their descriptors, and cancelled callers."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.machines import Machine, idle_machine
from vmspawn.errors import NotConnected, QmpError
from vmspawn.qmp.monitor import Command, Monitor

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def machine(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Machine]:
    async with idle_machine(qemu, tmp_path_factory.mktemp("monitor")) as machine:
        yield machine


def add_node(name: str) -> Command:
    return Command("blockdev-add", {"driver": "null-co", "node-name": name})


def remove_node(name: str) -> Command:
    return Command("blockdev-del", {"node-name": name})


async def test_commands_sent_together_run_in_order(machine: Machine) -> None:
    """Each command depends on the one before it."""
    raw = Command("blockdev-add", {"driver": "raw", "node-name": "above", "file": "below"})
    results = await machine.monitor.execute_all([add_node("below"), raw, remove_node("above"), remove_node("below")])
    assert results == [{}, {}, {}, {}]


async def test_a_command_that_fails_does_not_stop_the_others(machine: Machine) -> None:
    commands = [add_node("one"), add_node("one"), Command("no-such"), remove_node("one")]
    results = await machine.monitor.execute_all(commands)
    assert [isinstance(result, QmpError) for result in results] == [False, True, True, False]
    assert "one" in results[1].description
    assert (results[2].command, results[2].error_class) == ("no-such", "CommandNotFound")


async def test_each_descriptor_comes_with_its_own_command(machine: Machine, tmp_path: Path) -> None:
    """If one sendmsg passes several descriptors, QEMU keeps the first and closes the others."""
    paths = [tmp_path / name for name in ("first", "second")]
    files = []
    for path in paths:
        path.write_bytes(b"\0" * 512)
        files.append(os.open(path, os.O_RDONLY))
    try:
        adds = [Command("add-fd", {"fdset-id": 70 + n, "opaque": str(n)}, (fd,)) for n, fd in enumerate(files)]
        first, _, second = await machine.monitor.execute_all([adds[0], Command("query-name"), adds[1]])
        assert (first["fdset-id"], second["fdset-id"]) == (70, 71)
        pid = machine.pid
        assert [os.readlink(f"/proc/{pid}/fd/{each['fd']}") for each in (first, second)] == [str(p) for p in paths]
        gone = [Command("remove-fd", {"fdset-id": number}) for number in (70, 71)]
        assert await machine.monitor.execute_all(gone) == [{}, {}]
    finally:
        for fd in files:
            os.close(fd)


async def test_callers_get_the_replies_to_their_own_commands(machine: Machine) -> None:
    """Some callers are cancelled before their replies come."""

    async def ask(number: int) -> object:
        return await machine.monitor.execute("query-version" if number % 2 else "query-name")

    tasks = [asyncio.create_task(ask(number)) for number in range(40)]
    await asyncio.sleep(0)
    for task in tasks[::5]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for number, result in enumerate(results):
        if number % 5 == 0:
            assert isinstance(result, asyncio.CancelledError)
        else:
            assert isinstance(result, dict)
            assert ("qemu" in result) == bool(number % 2)


async def test_the_next_client_gets_no_reply_to_a_command_of_a_dead_client(qemu: str, tmp_path: Path) -> None:
    """A manager may die with commands in flight, and the next manager connects to the same monitor."""
    path = str(tmp_path / "monitor")
    async with idle_machine(qemu, tmp_path, qemu_arguments=("-qmp", f"unix:{path},server=on,wait=off")):
        for _ in range(20):
            died = socket.socket(socket.AF_UNIX)
            died.connect(path)
            died.sendall(b'{"execute":"qmp_capabilities"}' + b'{"execute":"query-version"}' * 10)
            died.close()
            taken = socket.socket(socket.AF_UNIX)
            taken.connect(path)
            monitor = Monitor(taken)
            assert "version" in await monitor.greeting()
            assert "running" in await monitor.execute("query-status")
            waiting = asyncio.create_task(monitor.execute("query-name"))
            await asyncio.sleep(0)
            monitor.close()
            with pytest.raises(NotConnected):
                await waiting

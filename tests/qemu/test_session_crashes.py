# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that a session refuses commands that would crash this QEMU, and that vmspawn does not send them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.conftest import make_raw
from tests.machines import Machine, idle_machine
from tests.qemu.bare_qemu import bare
from tests.qemu.qmp_fixtures import Request, request_id
from tests.qemu.run_states import machine_in, migrate, until
from vmspawn import Disk
from vmspawn.errors import NotSupported, QmpError
from vmspawn.qmp.monitor import Command, Monitor

DEVICE = ("-blockdev", "null-co,node-name=n", "-device", "virtio-blk-pci,id=d,drive=n")
BACKEND = "/machine/peripheral/d/virtio-backend"

STATUS: tuple[Request, ...] = (
    ("x-query-virtio-status", {"path": BACKEND}),
    ("human-monitor-command", {"command-line": f"info virtio-status {BACKEND}"}),
)
SAME_NODE: tuple[Request, ...] = (
    ("qom-set", {"path": "/machine/peripheral/d", "property": "drive", "value": "n"}),
    ("qom-set", {"path": BACKEND, "property": "drive", "value": "n"}),
    ("human-monitor-command", {"command-line": 'qom-set /machine/peripheral/d "drive" n'}),
)


def kills(qemu: str, command: Request) -> bool:
    """Return whether QEMU ends when the command is sent to its own monitor."""
    with bare(qemu, "q35", *DEVICE) as client:
        client.send(json.dumps({"execute": command[0], "arguments": command[1]}).encode())
        while b'"event"' in (line := client.line()):
            pass
        # QEMU may answer before it fails.
        with contextlib.suppress(BrokenPipeError):
            client.send(b'{"execute":"query-status"}')
        return not line or not client.line()


async def is_refused(session: Monitor, command: Request) -> bool:
    """Return whether a session refuses the command. QEMU must answer afterwards."""
    (found,) = await session.execute_all([Command(*command)])
    assert (await session.execute("query-status"))["status"]
    return f"command {command[0]} is refused: " in str(found)


@pytest.mark.parametrize("command", [*STATUS, *SAME_NODE], ids=request_id)
async def test_a_session_refuses_exactly_what_would_end_this_qemu(qemu: str, tmp_path: Path, command: Request) -> None:
    fatal = kills(qemu, command)
    async with idle_machine(qemu, tmp_path, qemu_arguments=DEVICE) as machine, machine.qmp() as session:
        assert await is_refused(session, command) is fatal


async def test_commands_similar_to_a_refused_one_reach_qemu(qemu: str, tmp_path: Path) -> None:
    similar: tuple[Request, ...] = (
        ("qom-set", {"path": "/machine/peripheral/d", "property": "drive", "value": "nonexistent"}),
        ("qom-set", {"path": "/machine/peripheral/d", "property": "drive", "value": ""}),
        ("qom-set", {"path": "/machine/peripheral/d", "property": "write-cache", "value": "n"}),
        ("qom-set", {"path": 7, "property": "drive", "value": ["n"]}),
        ("human-monitor-command", {"command-line": "qom-set /machine/peripheral/d"}),
        ("human-monitor-command", {"command-line": "info version"}),
        ("x-query-virtio", {}),
        ("block_resize", {"node-name": "n", "size": 1 << 20}),
        ("block_resize", {"size": "large"}),
    )
    async with idle_machine(qemu, tmp_path, qemu_arguments=DEVICE) as machine, machine.qmp() as session:
        for command in similar:
            assert not await is_refused(session, command)


@contextlib.asynccontextmanager
async def with_inactive_images(state: str, qemu: str, folder: Path) -> AsyncIterator[tuple[Machine, str]]:
    """Run a machine with a disk whose images are inactive. Yields the machine and the disk's node."""
    async with contextlib.AsyncExitStack() as closing:
        if state == "inmigrate":
            machine = await closing.enter_async_context(machine_in(state, qemu, folder))
        else:
            machine = await closing.enter_async_context(idle_machine(qemu, folder))
            await machine.attach(Disk(str(make_raw(folder / "disk.raw", 1 << 20)), name="disk"))
            await migrate(machine, folder, closing)
            await until(machine, "postmigrate")
        if state == "prelaunch":
            await machine.reboot()
            await until(machine, "prelaunch")
        name = "disk" if state != "inmigrate" else next(each.name for each in machine.storage)
        yield machine, machine.disk(name).identifiers.pivot


@pytest.mark.parametrize("state", ["postmigrate", "prelaunch", "inmigrate"])
async def test_a_session_resizes_no_inactive_image(qemu: str, tmp_path: Path, state: str) -> None:
    async with with_inactive_images(state, qemu, tmp_path) as (machine, node), machine.qmp() as session:
        with pytest.raises(QmpError, match=r"is inactive|inactive node"):
            await session.execute("block_resize", {"node-name": node, "size": 2 << 20})
        assert (await session.execute("query-status"))["status"] == state


@pytest.mark.parametrize("state", ["postmigrate", "prelaunch"])
async def test_an_inactive_image_is_changed_once_the_guest_runs_again(qemu: str, tmp_path: Path, state: str) -> None:
    larger = make_raw(tmp_path / "larger.raw", 4 << 20)
    async with with_inactive_images(state, qemu, tmp_path) as (machine, _):
        for change in (machine.resize("disk", 2 << 20), machine.replace("disk", str(larger))):
            with pytest.raises(NotSupported, match=f"cannot change images while the guest is {state}") as caught:
                await change
            assert "resume" in caught.value.hint
        assert await machine.status() == state
        assert str(larger) not in str(await machine.monitor.execute("query-fdsets"))
        await machine.resume()
        assert await machine.resize("disk", 2 << 20) == 2 << 20
        assert await machine.replace("disk", str(larger)) == 4 << 20


async def test_a_save_and_a_controller_that_cannot_be_saved_exclude_each_other(qemu: str, tmp_path: Path) -> None:
    async with idle_machine(qemu, tmp_path) as machine:
        saving = machine.inner.hotplug.saving
        async with machine.qmp() as session:
            async with saving.device_comes():
                for command in (
                    ("migrate", {"uri": "unix:/proc/nonexistent"}),
                    ("human-monitor-command", {"command-line": "savevm tag"}),
                ):
                    assert await is_refused(session, command)
            # Commands that have run, were refused, or came from a client that is gone, no longer block anything.
            assert not await is_refused(session, ("migrate", {"uri": "unix:/proc/nonexistent"}))
            leaving = asyncio.create_task(session.execute("human-monitor-command", {"command-line": "savevm tag"}))
            await asyncio.sleep(0)
        await asyncio.gather(leaving, return_exceptions=True)
        async with asyncio.timeout(10), saving.device_comes():
            pass


async def test_a_command_that_does_not_save_does_not_delay_a_controller(qemu: str, tmp_path: Path) -> None:
    commands: tuple[Request, ...] = (
        ("block_resize", {"node-name": "n", "size": 1 << 20}),
        ("qom-set", {"path": "/machine/peripheral/d", "property": "write-cache", "value": "n"}),
        ("x-query-virtio-status", {"path": BACKEND}),
        ("human-monitor-command", {"command-line": "info version"}),
        ("human-monitor-command", {"command-line": 7}),
    )
    async with idle_machine(qemu, tmp_path, qemu_arguments=DEVICE) as machine, machine.qmp() as session:
        (server,) = machine.sessions
        # While QEMU is stopped, each command stays without a reply.
        for number, command in enumerate(commands, server.commands + 1):
            os.kill(machine.pid, signal.SIGSTOP)
            try:
                running = asyncio.create_task(session.execute_all([Command(*command)]))
                async with asyncio.timeout(10):
                    while server.commands < number:  # noqa: ASYNC110 - nothing reports it
                        await asyncio.sleep(0)
                    async with machine.inner.hotplug.saving.device_comes():
                        assert server.queued
            finally:
                os.kill(machine.pid, signal.SIGCONT)
            await running


async def test_a_controller_waits_until_a_save_has_begun(qemu: str, tmp_path: Path) -> None:
    async with idle_machine(qemu, tmp_path) as machine:
        if not machine.inner._started.binary.has_namespaces:
            pytest.skip("this QEMU plugs no NVMe namespaces in while the machine runs")
        machine.inner.hotplug.saving.begin()
        disk = Disk(str(make_raw(tmp_path / "disk.raw", 1 << 20)), name="disk", bus="nvme-ns")
        attaching = asyncio.create_task(machine.attach(disk))
        # Meanwhile, another disk can be attached.
        await machine.attach(Disk(str(make_raw(tmp_path / "other.raw", 1 << 20)), name="other"))
        devices = await machine.monitor.execute("qom-list", {"path": "/machine/peripheral"})
        assert "nvme0" not in {each["name"] for each in devices}
        machine.inner.hotplug.saving.end()
        await attaching

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bounds that nothing else runs into (docs/security.md), and a runtime directory without room."""

import array
import asyncio
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import MIB, make_raw
from tests.machines import Snapshot, idle_machine
from vmspawn import Drive, Event, MachineConfig
from vmspawn.console.hub import CLIENTS_MAX
from vmspawn.control import connection as limits
from vmspawn.control.server import ControlServer, build_registry
from vmspawn.errors import SystemFailure
from vmspawn.host import runtime
from vmspawn.machine.adopt import adopt
from vmspawn.machine.machine import Machine
from vmspawn.qmp.monitor import EVENT_QUEUE_MAX


async def test_a_reader_that_lets_events_lie_is_told_that_some_are_lost(qemu: str, tmp_path: Path) -> None:
    async with idle_machine(qemu, tmp_path) as machine:
        with machine.events() as slow, machine.events() as other:
            for number in range(EVENT_QUEUE_MAX + 1):
                machine.monitor.publish(Event("TEST", {"number": number}))
                assert (await anext(other)).data == {"number": number}
            assert slow.overrun
            assert not other.overrun
            assert len([event async for event in slow]) == EVENT_QUEUE_MAX


async def test_descriptors_without_end_end_the_connection(qemu: str, tmp_path: Path) -> None:
    """Also where each message has only a few of them."""
    async with idle_machine(qemu, tmp_path) as machine:
        server = ControlServer(machine.directory, build_registry(machine))
        _, writer = await asyncio.open_unix_connection(machine.directory.file(runtime.CONTROL))
        raw = writer.get_extra_info("socket").dup()
        raw.setblocking(False)
        fds = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * 100))]
        sent = 0
        async with asyncio.timeout(20):
            with pytest.raises(OSError, match=r"."):
                while True:
                    try:
                        raw.sendmsg([b" "], fds)
                        sent += 100
                    except BlockingIOError:
                        pass
                    await asyncio.sleep(0)
        assert sent > limits.DESCRIPTORS_MAX
        raw.close()
        writer.close()
        server.close()


@pytest.fixture
def small_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory on a file system of 1 MiB."""
    folder = tmp_path / "run"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M,mode=0700", "none", str(folder)], check=False)
    if done.returncode != 0:
        pytest.skip("only root can mount a file system")
    monkeypatch.setenv("VMSPAWN_RUNTIME_DIR", str(folder))
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


async def test_what_cannot_be_written_down_is_not_done(qemu: str, tmp_path: Path, small_root: Path) -> None:
    """A runtime directory without room: attaching fails and says why, detaching works, and so does another manager."""
    async with idle_machine(qemu, tmp_path) as machine:
        await machine.attach(Drive(str(make_raw(tmp_path / "before")), bus="virtio-scsi"))
        before = await Snapshot.take(machine)
        fill(small_root / "filler")
        with pytest.raises(SystemFailure, match="cannot write down what is about to be done") as caught:
            await machine.attach(Drive(str(make_raw(tmp_path / "disk")), bus="virtio-scsi"))
        assert caught.value.errno_name == "ENOSPC"
        assert await Snapshot.take(machine) == before
        await machine.detach("before")
        # What is written down is a whole state, if an old one.
        name = machine.name
        await machine.leave()
        launched = adopt(MachineConfig(name=name, console="headless"))
        os.unlink(small_root / "filler")
        again = Machine(launched.config)
        again.open(launched)
        await again.started()
        assert again.adoption_notes == ["before was removed meanwhile"]
        await again.attach(Drive(str(tmp_path / "disk"), bus="virtio-scsi"))
        await again.close()


def fill(path: Path) -> None:
    """Leave no room."""
    with open(path, "wb", buffering=0) as file:
        try:
            while file.write(b"x" * MIB):
                pass
        except OSError:
            pass


async def test_one_viewer_of_the_console_too_many_is_let_go(qemu: str, tmp_path: Path) -> None:
    async with idle_machine(qemu, tmp_path) as machine:
        path = machine.directory.file(runtime.CONSOLE)
        viewers = [await asyncio.open_unix_connection(path) for _ in range(CLIENTS_MAX + 1)]
        async with asyncio.timeout(20):
            await viewers[-1][0].read()
        assert not any(reader.at_eof() for reader, _ in viewers[:-1])
        for _, writer in viewers:
            writer.close()
            await writer.wait_closed()

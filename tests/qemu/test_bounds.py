# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests a lack of room: for unread events, and in the runtime directory."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import MIB, make_raw
from tests.machines import Resources, idle_machine
from tests.small_disks import SmallDisk, mounted
from vmspawn import Disk, Event, MachineConfig
from vmspawn.boot.adopt import adopt
from vmspawn.errors import SystemFailure
from vmspawn.machine.recent_events import EVENTS, TEXT_MAX
from vmspawn.machine.running import run
from vmspawn.qmp.events import EVENT_QUEUE_MAX
from vmspawn.storage.backing import open_disk


async def test_a_slow_reader_learns_that_events_are_lost(qemu: str, tmp_path: Path) -> None:
    async with idle_machine(qemu, tmp_path) as machine:
        with machine.events() as slow, machine.events() as other:
            for number in range(EVENT_QUEUE_MAX + 1):
                machine.monitor.publish(Event("TEST", {"number": number}))
                assert (await anext(other)).data == {"number": number}
            assert slow.is_overrun
            assert not other.is_overrun
            assert len([event async for event in slow]) == EVENT_QUEUE_MAX
        # The recent events, which `vmctl status` shows, have limits of their own.
        assert len(machine.recent_events.events) == EVENTS
        machine.monitor.publish(Event("TEST", {"text": "x" * TEXT_MAX}))
        assert len(machine.recent_events.events[-1].text) == TEXT_MAX


@pytest.fixture
def small_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallDisk]:
    """Mount a file system of 1 MiB as the runtime directory."""
    with mounted(tmp_path / "run", MIB, is_lazy=True) as folder:
        monkeypatch.setenv("VMSPAWN_RUNTIME_DIR", str(folder))
        yield SmallDisk(folder)


async def test_a_change_that_cannot_be_journaled_is_not_made(qemu: str, tmp_path: Path, small_root: SmallDisk) -> None:
    """Without room in the runtime directory, an attach fails with the reason; a detach and an adoption work."""
    async with idle_machine(qemu, tmp_path) as machine:
        await machine.attach(Disk(str(make_raw(tmp_path / "before")), bus="virtio-scsi"))
        before = await Resources.of(machine)
        small_root.fill()
        with pytest.raises(SystemFailure, match="cannot write the machine's state") as caught:
            await machine.attach(Disk(str(make_raw(tmp_path / "disk")), bus="virtio-scsi"))
        assert caught.value.errno_name == "ENOSPC"
        assert await Resources.of(machine) == before
        await machine.detach("before")
        # The file has a complete state, although an old one.
        name = machine.name
        await machine.leave()
        started = adopt(MachineConfig(name=name, console="headless"))
        small_root.empty()
        notes: list[str] = []
        again = await run(started, notice=notes.append)
        assert notes == ["before has no device in QEMU; its remains are removed"]
        backing = open_disk(str(tmp_path / "disk"), read_only=False)
        await again.storage.attach(Disk("", "disk", "virtio-scsi"), backing)
        await again.end()

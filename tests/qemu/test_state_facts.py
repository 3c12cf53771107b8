# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the facts of docs/qemu.md about saved states, and about QEMU's end, with a bare QEMU."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import MIB, make_raw
from tests.qemu.bare_qemu import Monitor, bare
from tests.qemu.qmp_fixtures import DEADLINE, wait_until

#: A disk on a throttle filter, attached from boot.
DISK = (
    *("-object", "throttle-group,id=group", "-blockdev", "file,node-name=n0,filename={image}"),
    *("-blockdev", "throttle,node-name=pivot,throttle-group=group,file=n0"),
    *("-device", "virtio-blk-pci,id=d0,drive=pivot,bus=port0,addr=0x0"),
)


def disk(image: Path) -> tuple[str, ...]:
    """Return the options of a disk on that image."""
    return tuple(word.format(image=image) for word in DISK)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_raw(tmp_path / "image", MIB)


@pytest.fixture
def machine(qemu: str, image: Path) -> Iterator[Monitor]:
    with bare(qemu, "q35", *disk(image)) as monitor:
        yield monitor


def pass_state(monitor: Monitor, fd: int) -> str:
    """Pass a descriptor for the state, in the form that this QEMU supports; returns its URI.

    QEMU 7.2 uses a descriptor that getfd has named, 11.1 a descriptor set.
    """
    transports = {"socket", "exec", "rdma", "file"}
    if any(transports <= set(each.get("values", ())) for each in monitor.succeed("query-qmp-schema")):
        monitor.succeed("add-fd", fdset_id=9, fds=[fd])
        return "file:/dev/fdset/9"
    monitor.succeed("getfd", fdname="state", fds=[fd])
    return "fd:state"


def transfer(monitor: Monitor, command: str, path: Path, flags: int) -> str:
    """Save or load the state; returns `completed` or `failed`."""
    monitor.succeed("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
    fd = os.open(path, flags)
    try:
        monitor.succeed(command, uri=pass_state(monitor, fd))
    finally:
        os.close(fd)
    while (status := str(monitor.event("MIGRATION")["status"])) not in ("completed", "failed"):
        pass
    return status


def save(monitor: Monitor, path: Path) -> str:
    """Save the state to a file."""
    return transfer(monitor, "migrate", path, os.O_WRONLY | os.O_CREAT)


def wait_for_status(monitor: Monitor, status: str) -> None:
    """Wait until QEMU is in a run state. No event reports the end of a save in every version."""
    wait_until(lambda: bool(monitor.succeed("query-status")["status"] == status), f"the run state {status}")


def test_the_state_is_saved_to_a_descriptor(machine: Monitor, tmp_path: Path) -> None:
    """A disk on a throttle filter does not prevent a save."""
    machine.succeed("cont")
    machine.succeed("stop")
    assert save(machine, tmp_path / "state") == "completed"
    wait_for_status(machine, "postmigrate")
    assert (tmp_path / "state").stat().st_size > 0


def test_a_saved_state_is_loaded_by_a_qemu_with_the_same_devices(qemu: str, tmp_path: Path) -> None:
    """The state is loaded from a descriptor that is O_RDONLY."""
    image = make_raw(tmp_path / "image", MIB)
    with bare(qemu, "q35", *disk(image)) as source:
        source.succeed("cont")
        source.succeed("stop")
        assert save(source, tmp_path / "state") == "completed"
    with bare(qemu, "q35", *disk(image), "-incoming", "defer") as copy:
        assert copy.succeed("query-status")["status"] == "inmigrate"
        assert transfer(copy, "migrate-incoming", tmp_path / "state", os.O_RDONLY) == "completed"
        copy.succeed("cont")
        assert copy.succeed("query-status")["status"] == "running"


def test_after_a_save_cont_and_stop_return_to_the_state_paused(machine: Monitor, tmp_path: Path) -> None:
    machine.succeed("cont")
    machine.succeed("stop")
    assert save(machine, tmp_path / "state") == "completed"
    wait_for_status(machine, "postmigrate")
    assert machine.fail("migrate", uri="tcp:127.0.0.1:1") == (
        "Can't migrate the vm that was paused due to previous migration"
    )
    machine.succeed("cont")
    machine.succeed("stop")
    assert machine.succeed("query-status")["status"] == "paused"
    machine.succeed("block_resize", node_name="pivot", size=2 * MIB)


def test_images_are_inactive_from_a_save_until_cont(machine: Monitor, image: Path, tmp_path: Path) -> None:
    """QEMU keeps an inactive image open without locks, so that another QEMU can write to it."""
    machine.succeed("cont")
    machine.succeed("stop")
    assert is_locked(image)
    assert save(machine, tmp_path / "state") == "completed"
    wait_for_status(machine, "postmigrate")
    assert not is_locked(image)
    assert str(image) in machine.open_files()
    machine.succeed("cont")
    assert is_locked(image)


def is_locked(image: Path) -> bool:
    """Return whether another program keeps this one from opening an image for writing."""
    command = ["qemu-io", "-f", "raw", "-c", "length", str(image)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 0 or 'Failed to get "write" lock' in done.stderr, done.stderr
    return done.returncode != 0


def test_a_controller_with_its_own_drive_is_saved_or_refused_beforehand(qemu: str, tmp_path: Path) -> None:
    """QEMU 7.2 saves no nvme device. QEMU 11.1 saves this one, and crashes if the controller has no drive."""
    image = make_raw(tmp_path / "image", MIB)
    device = ("-blockdev", f"file,node-name=n0,filename={image}", "-device", "nvme,id=d0,serial=x,drive=n0,bus=port0")
    with bare(qemu, "q35", *device) as monitor:
        if reasons := monitor.succeed("query-migrate").get("blocked-reasons"):
            assert any(each.startswith("non-migratable device: ") and each.endswith("/nvme") for each in reasons)
            refusal = monitor.fail("migrate", uri="tcp:127.0.0.1:1")
            assert refusal.startswith("State blocked by non-migratable device ")
        else:
            assert save(monitor, tmp_path / "state") == "completed"


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGTERM, "host-signal"), (0, "host-qmp-quit")])
def test_qemu_reports_the_reason_of_its_end_and_exits_with_0(machine: Monitor, number: int, reason: str) -> None:
    if number:
        machine.machine.process.send_signal(number)
    else:
        machine.succeed("quit")
    assert machine.event("SHUTDOWN") == {"guest": False, "reason": reason}
    assert machine.at_end()
    assert machine.machine.process.wait(DEADLINE) == 0


def test_no_device_can_be_added_while_a_migration_runs(qemu: str, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as there, bare(qemu, "q35") as monitor:
        there.bind(str(tmp_path / "there"))
        there.listen()
        there.settimeout(DEADLINE)
        capability = {"capability": "pause-before-switchover", "state": True}
        monitor.succeed("migrate-set-capabilities", capabilities=[capability])
        monitor.succeed("migrate", uri=f"unix:{tmp_path / 'there'}")
        connected, _ = there.accept()
        with connected:
            reader = threading.Thread(target=read_all, args=(connected,))
            reader.start()
            # The thread ends with QEMU.
            refusal = monitor.fail("device_add", driver="virtio-rng-pci", bus="port0", addr="0x0")
            assert refusal == "device_add not allowed while migrating"
            monitor.machine.kill()
            reader.join(DEADLINE)


def read_all(connected: socket.socket) -> None:
    """Read a socket until its other end is closed."""
    while connected.recv(1 << 16):
        pass

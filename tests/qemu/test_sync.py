# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the blocking library with machines: in a program, in threads, at interruptions and at exit."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmspawn
import vmspawn.sync
from tests.commands import DEADLINE
from tests.conftest import MIB, make_raw
from tests.machines import fresh_name, is_gone, process_is_gone
from vmspawn.api import blocking


def made(qemu: str, folder: Path) -> vmspawn.sync.Machine:
    """Return a machine whose guest is its firmware."""
    image = make_raw(folder / f"boot-{fresh_name()}", MIB)
    return vmspawn.sync.Machine(image=image, qemu=qemu, name=fresh_name(), ram="64M", console="headless")


@pytest.fixture
def machine(qemu: str, tmp_path: Path) -> Iterator[vmspawn.sync.Machine]:
    with made(qemu, tmp_path) as running:
        yield running


def test_a_program_controls_its_own_machine(machine: vmspawn.sync.Machine, tmp_path: Path) -> None:
    assert machine.status() == "running"
    attached = machine.attach(make_raw(tmp_path / "data"), bus="virtio-scsi")
    assert [each.disk for each in machine.disks()][-1] == attached
    assert machine.resize("data", "96M") == 96 * MIB
    with machine.events() as events:
        machine.pause()
        assert next(events).name == "STOP"
    mark = machine.events.mark
    machine.resume()
    assert machine.events.wait("RESUME", since=mark).name == "RESUME"
    with machine.qmp(read_only=True) as qmp:
        assert repr(qmp) == "<QMP connection, open>"
        assert qmp.execute("query-kvm")
        with pytest.raises(vmspawn.QmpError):
            qmp.execute("nonsense")
    assert (machine.directory / "state.json").exists()
    machine.terminate()
    assert machine.wait().clean
    assert machine.events.recent[-1].name == "MachineEnded"
    with machine.events() as events:
        assert [event.name for event in events] == ["MachineEnded"]


def test_a_program_controls_a_machine_that_it_connects_to(machine: vmspawn.sync.Machine, tmp_path: Path) -> None:
    with vmspawn.sync.connect(machine.name) as connected:
        connected.attach(make_raw(tmp_path / "data"), bus="virtio-scsi")
        assert connected.disks() == machine.disks()
        with connected.events() as events:
            machine.pause()
            assert next(events).name == "STOP"
        assert connected.console.text == ""
        with connected.qmp() as qmp:
            stream = qmp.events()
            qmp.execute("cont")
            assert next(stream).name == "RESUME"
    with pytest.raises(vmspawn.NotConnected), vmspawn.sync.connect("nobody"):
        pass


def test_each_thread_can_have_its_own_machine(qemu: str, tmp_path: Path) -> None:
    states: list[str] = []

    def live() -> None:
        with made(qemu, tmp_path) as machine:
            states.append(machine.status())

    threads = [threading.Thread(target=live) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert states == ["running"] * 3
    assert not blocking.background().open


def test_a_start_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    machine = vmspawn.sync.Machine(image=tmp_path / "none", name=fresh_name())
    with pytest.raises(vmspawn.VmspawnError), machine:
        pass
    assert not blocking.background().open


PROGRAM = """
import signal, sys, time, vmspawn.sync
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with SIGINT ignored
machine = vmspawn.sync.Machine(image=sys.argv[1], qemu=sys.argv[2], name=sys.argv[3], ram="64M", console="headless")
machine.__enter__()
print(machine.pid, flush=True)
"""


def program(qemu: str, folder: Path, name: str, more: str) -> subprocess.Popen[str]:
    image = make_raw(folder / f"boot-{name}", MIB)
    command = [sys.executable, "-c", PROGRAM + more, str(image), qemu, name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_program_that_exits_ends_its_machines(qemu: str, tmp_path: Path) -> None:
    """An interactive interpreter ends its machines, too, when the user leaves it."""
    name = fresh_name()
    output, errors = program(qemu, tmp_path, name, "").communicate(timeout=DEADLINE)
    assert errors == ""
    assert process_is_gone(int(output))
    assert is_gone(name)


@pytest.mark.parametrize(
    "call", ["machine.wait()", "machine.console.expect('never', timeout=None)", "time.sleep(1000)"]
)
def test_ctrl_c_ends_a_program_and_its_machines(qemu: str, tmp_path: Path, call: str) -> None:
    name = fresh_name()
    with program(qemu, tmp_path, name, call) as running:
        assert running.stdout
        pid = int(running.stdout.readline())
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=DEADLINE)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert running.returncode == -signal.SIGINT
    assert process_is_gone(pid)
    assert is_gone(name)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_leaves_the_machine_to_its_parent(qemu: str, tmp_path: Path) -> None:
    with made(qemu, tmp_path) as machine:
        pid = os.fork()
        if not pid:
            try:
                machine.__exit__()
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert machine.status() == "running"

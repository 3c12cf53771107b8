# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests a stopped QEMU or manager: each verb reports it within its timeout, and the machine can be ended."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import DEADLINE, Spawned, idle, one_line, qemu_pid, vmctl, vmspawn
from tests.conftest import make_raw
from tests.machines import is_gone, process_is_gone
from tests.survivors import Survivor, idle_survivor


@pytest.fixture
def orphan(qemu: str, tmp_path: Path) -> Iterator[Survivor]:
    """Start a machine without a manager."""
    with idle_survivor(qemu, tmp_path) as machine:
        machine.kill_manager()
        yield machine


@pytest.fixture
def stopped(orphan: Survivor) -> Survivor:
    """Start a machine without a manager, and stop its QEMU."""
    os.kill(orphan.pid, signal.SIGSTOP)
    return orphan


def test_a_stopped_qemu_is_not_adopted(stopped: Survivor) -> None:
    """The first attempts connect to QEMU's sockets. They fill the sockets' queues, so later attempts cannot connect."""
    for _ in range(6):
        done = vmspawn("--adopt", "-M", stopped.name)
        assert done.returncode == 1
        assert f"QEMU does not answer: process {stopped.pid} is stopped" in done.stderr
        assert f"vmctl terminate {stopped.name}" in done.stderr
        assert "adopted" not in done.stderr
    os.kill(stopped.pid, signal.SIGCONT)
    stopped.adopt()
    assert "adopted" in stopped.manager.output["stderr"]


def test_a_stopped_qemu_without_a_manager_is_ended(stopped: Survivor) -> None:
    assert vmctl("terminate", stopped.name).returncode == 0
    assert process_is_gone(stopped.pid)
    assert is_gone(stopped.name)


def test_a_running_qemu_without_a_manager_is_ended(orphan: Survivor) -> None:
    done = vmctl("terminate", orphan.name, "--wait")
    assert done.returncode == 0
    assert process_is_gone(orphan.pid)
    assert is_gone(orphan.name)


@pytest.fixture
def machine(qemu: str, tmp_path: Path) -> Iterator[Spawned]:
    with idle(qemu, tmp_path) as running:
        yield running


def test_status_shows_the_last_known_state_of_a_stopped_qemu(machine: Spawned) -> None:
    pid = qemu_pid(machine.name)
    os.kill(pid, signal.SIGSTOP)
    try:
        shown = vmctl("status", machine.name, timeout=15)
        assert shown.returncode == 0
        assert "running (last known state): QEMU does not answer and is stopped (as by SIGSTOP)" in shown.stdout
        assert "boot" in shown.stdout
        found = json.loads(vmctl("status", machine.name, "--json=short").stdout)
        assert (found["status"], found["responding"]) == ("running", False)
        assert "unresponsive" in vmctl("list").stdout
    finally:
        os.kill(pid, signal.SIGCONT)
    assert json.loads(vmctl("status", machine.name, "--json=short").stdout)["responding"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("status",),
        ("console",),
        ("events",),
        ("pause",),
        ("poweroff", "--wait"),
        ("terminate",),
        ("list-disks",),
        ("list-sessions",),
        ("qmp", "query-status"),
    ],
    ids=" ".join,
)
def test_a_verb_obeys_its_timeout_if_the_manager_is_stopped(machine: Spawned, arguments: tuple[str, ...]) -> None:
    machine.signal(signal.SIGSTOP)
    try:
        done = vmctl(arguments[0], "--timeout=0.5", machine.name, *arguments[1:], timeout=15)
        assert done.returncode == 1
        assert "did not answer" in one_line(done, "vmctl")
        assert f"process {machine.process.pid}, which serves it, is stopped" in done.stderr
    finally:
        machine.signal(signal.SIGCONT)


@pytest.mark.parametrize(
    "arguments",
    [
        ("pause",),
        ("list-disks",),
        ("attach-disk", "{image}"),
        ("qmp", "query-status"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_verb_reports_that_qemu_is_stopped(machine: Spawned, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    image = make_raw(tmp_path / "disk.raw", 1 << 20)
    pid = qemu_pid(machine.name)
    os.kill(pid, signal.SIGSTOP)
    try:
        verb, *rest = (each.format(image=image) for each in arguments)
        done = vmctl(verb, "--timeout=1", machine.name, *rest, timeout=30)
        assert done.returncode == 1
        assert "did not answer" in one_line(done, "vmctl")
        assert f"QEMU (process {pid}) is stopped" in done.stderr
        # `pause` asks for the state first, and may give up before it has requested the change.
        if verb != "pause":
            assert ("the request may still take effect" in done.stderr) is (verb == "attach-disk")
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.soak
@pytest.mark.parametrize("arguments", [("detach-disk", "x"), ("eject-media", "x")], ids=lambda arguments: arguments[0])
def test_a_verb_that_waits_for_the_guest_obeys_its_timeout(machine: Spawned, arguments: tuple[str, str]) -> None:
    verb, disk = arguments
    machine.signal(signal.SIGSTOP)
    try:
        done = vmctl(verb, "--timeout=0.5", machine.name, disk, timeout=30)
        assert done.returncode == 1
        assert "did not answer" in one_line(done, "vmctl")
    finally:
        machine.signal(signal.SIGCONT)


@pytest.mark.soak
def test_sessions_work_again_once_a_stopped_qemu_continues(machine: Spawned) -> None:
    pid = qemu_pid(machine.name)
    os.kill(pid, signal.SIGSTOP)
    for _ in range(2):
        refused = vmctl("qmp", machine.name, "query-status", timeout=DEADLINE)
        assert refused.returncode == 1
        assert "did not answer" in refused.stderr or "gave no greeting" in refused.stderr
    os.kill(pid, signal.SIGCONT)
    done = vmctl("qmp", machine.name, "query-status")
    assert (done.returncode, done.stderr) == (0, "")

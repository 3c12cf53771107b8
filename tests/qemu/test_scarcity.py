# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests a lack of descriptors, of disk space and of readers: each error is one line, and nothing is left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import DEADLINE, VMCTL, VMSPAWN, Spawned, idle, one_line, qemu_pid, vmctl
from tests.conftest import make_raw
from tests.machines import fresh_name, is_gone, links_of, process_is_gone
from tests.survivors import idle_survivor

#: With fewer descriptors, Python itself finds no modules.
FEWEST = 6
#: More descriptors than a start of QEMU needs.
MOST = 64


def test_a_start_that_lacks_descriptors_leaves_nothing_behind(qemu: str, tmp_path: Path) -> None:
    """The limit grows by one each time, until QEMU starts, and exits because of an option that it does not support."""
    image = make_raw(tmp_path / "image", 1 << 20)
    options = [f"--qemu={qemu}", f"--image={image}", "--ram=64M", "--console=headless", "--qemu-arg=-nonsense"]
    said = []
    for count in range(FEWEST, MOST):
        name = fresh_name()
        command = ["prlimit", f"--nofile={count}", "--", *VMSPAWN, "-M", name, *options]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE, check=False
        )
        said.append(one_line(done, "vmspawn"))
        assert ("cannot start the machine" in said[-1]) == ("ulimit -Hn" in done.stderr), done.stderr
        assert done.returncode == 1
        assert is_gone(name)
        if "-nonsense" in said[-1]:
            break
    *lacking, last = said
    assert "-nonsense" in last
    assert len(lacking) > 5
    assert all("Too many open files" in line for line in lacking), lacking


def test_an_adoption_that_lacks_descriptors_leaves_the_machine_running(qemu: str, tmp_path: Path) -> None:
    """QEMU continues to run each time, and its disks are still there when an adoption has enough descriptors."""
    with idle_survivor(qemu, tmp_path) as machine:
        machine.attach(make_raw(tmp_path / "disk", 1 << 20), "--bus=virtio-scsi")
        before = machine.disks()
        machine.kill_manager()
        refused = 0
        for count in range(FEWEST, MOST):
            program = ["prlimit", f"--nofile={count}", "--", *VMSPAWN]
            machine.manager = Spawned(machine.name, ("--adopt", "--console=headless"), program=program)
            status = machine.manager.ended_before("is running")
            if status is None:
                break
            assert status == 1
            assert "Too many open files" in machine.manager.output["stderr"]
            assert not process_is_gone(machine.pid)
            machine.manager.close()
            refused += 1
        assert refused > 5
        machine.kill_manager()
        machine.adopt()
        assert machine.disks() == before
        assert vmctl("detach-disk", machine.name, "disk").returncode == 0


def test_a_manager_that_lacks_descriptors_continues_to_run(qemu: str, tmp_path: Path) -> None:
    """A client whose call needs more descriptors gets the reason, and the next client is served."""
    disk = make_raw(tmp_path / "disk", 1 << 20)
    with idle(qemu, tmp_path) as machine:
        pid, name = machine.process.pid, machine.name
        before = links_of(pid)
        numbers = {int(each.name) for each in Path(f"/proc/{pid}/fd").iterdir()}
        lowest = min(set(range(MOST)) - numbers)
        failed = 0
        # The client's connection is one descriptor, and its image another.
        for more in range(1, 6):
            limit(pid, lowest + more)
            for arguments in (("attach-disk", name, str(disk), "--bus=virtio-scsi"), ("qmp", name, "query-name")):
                done = vmctl(*arguments)
                if done.returncode:
                    failed += 1
                    assert "open files" in one_line(done, "vmctl") or "closed the connection" in done.stderr
            disks = [each["name"] for each in json.loads(vmctl("list-disks", name, "--json=short").stdout)]
            if "disk" in disks:
                assert vmctl("detach-disk", name, "disk").returncode == 0
        assert failed > 2
        limit(pid, MOST)
        assert vmctl("attach-disk", name, str(disk), "--bus=virtio-scsi").returncode == 0
        assert vmctl("detach-disk", name, "disk").returncode == 0
        assert "Traceback" not in machine.output["stderr"]
        assert sorted(links_of(pid)) == sorted(before)


@pytest.mark.parametrize("limits", ["20:4096", "64:64"], ids=["soft", "hard"])
def test_a_machine_starts_if_an_inherited_descriptor_is_above_the_limit(qemu: str, tmp_path: Path, limits: str) -> None:
    """A shell passes on such a descriptor after `exec 200<file`. QEMU must not inherit it, as it cannot be closed."""
    image = make_raw(tmp_path / "image", 1 << 20)
    name = fresh_name()
    options = (f"--qemu={qemu}", f"--image={image}", "--ram=64M", "--console=headless")
    open_high = "import os, sys; os.dup2(0, 200); os.execvp(sys.argv[1], sys.argv[1:])"
    program = [sys.executable, "-c", open_high, "prlimit", f"--nofile={limits}", "--", *VMSPAWN]
    machine = Spawned(name, options, program=program)
    try:
        machine.wait_for("is running")
        assert Path(f"/proc/{machine.process.pid}/fd/200").exists()
        assert not Path(f"/proc/{qemu_pid(name)}/fd/200").exists()
        assert machine.terminate()
        assert machine.wait() == 0
    finally:
        machine.close()
    assert is_gone(name)


def limit(pid: int, descriptors: int) -> None:
    """Keep a process from opening descriptors with this number or a larger one; its open ones stay open."""
    subprocess.run(["prlimit", f"--pid={pid}", f"--nofile={descriptors}:4096"], check=True)


@pytest.mark.parametrize(
    "command", [[*VMCTL, "list"], [*VMCTL, "--help"], [*VMSPAWN, "--help"], [*VMSPAWN, "--version"]]
)
def test_a_full_output_is_an_error(command: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=DEADLINE, check=False)
    program = "vmctl" if command[:3] == VMCTL else "vmspawn"
    assert (done.returncode, done.stderr) == (1, f"{program}: cannot write the output: No space left on device\n")


@pytest.mark.parametrize("command", [[*VMCTL, "list"], [*VMSPAWN, "--help"]])
def test_an_output_whose_reader_has_ended_is_not_an_error(command: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=DEADLINE, check=False)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_output_to_a_closed_stream_is_dropped() -> None:
    """Output for one stream does not end up in another."""
    listed = closing(">&-", "list")
    assert (listed.returncode, listed.stdout, listed.stderr) == (0, "", "")
    unknown = closing("2>&-", "status", "nobody")
    assert (unknown.returncode, unknown.stdout, unknown.stderr) == (1, "", "")


def closing(redirection: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run vmctl from a shell that closes one of its streams."""
    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", *VMCTL, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests virtiofsd: one is started for each directory, ends with the machine, and ends the machine if it dies."""

import os
import signal
from pathlib import Path

import pytest

from tests.commands import Spawned, qemu_pid, spawned, vmctl, vmspawn
from tests.conftest import make_raw
from tests.machines import fresh_name, is_gone, process_is_gone
from tests.survivors import survivor, wait_until_dead
from vmspawn.errors import StartError
from vmspawn.helpers import virtiofsd

try:
    PROGRAM = virtiofsd.find()
except StartError as error:
    pytest.skip(str(error), allow_module_level=True)

if not PROGRAM.is_rust and os.geteuid() != 0:
    pytest.skip("this virtiofsd needs root", allow_module_level=True)


def servers(machine: Spawned) -> list[int]:
    """Return the virtiofsd processes that the manager started; each may have children for its sandbox."""
    children = Path(f"/proc/{machine.process.pid}/task/{machine.process.pid}/children").read_text().split()
    return [int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text().strip() == "virtiofsd"]


@pytest.fixture
def sharing(options: tuple[str, ...], tmp_path: Path) -> tuple[str, ...]:
    """Return the options of a machine that shares two directories."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    return (*options, "--console=headless", f"--bind={tmp_path}/one:/mnt/one", f"--bind-ro={tmp_path}/two:/mnt/two")


@pytest.mark.parametrize("machine_type", ["q35", "pc"])
def test_each_directory_has_a_virtiofsd_that_ends_with_the_machine(sharing: tuple[str, ...], machine_type: str) -> None:
    with spawned(*sharing, f"--machine-type={machine_type}") as machine:
        machine.wait_for("is running")
        pids = servers(machine)
        assert len(pids) == 2
        assert vmctl("terminate", machine.name).returncode == 0
        assert machine.wait() == 0
    assert all(process_is_gone(pid) for pid in pids)
    assert is_gone(machine.name)


def test_the_hosts_own_root_is_served(options: tuple[str, ...]) -> None:
    """virtiofsd in C cannot change its root to a directory that is its root already."""
    with spawned(*options, "--console=headless", "--bind=/:/mnt/host") as machine:
        # QEMU starts when virtiofsd has answered it.
        machine.wait_for("is running")
        (pid,) = servers(machine)
        assert machine.terminate()
        assert machine.wait() == 0
    assert process_is_gone(pid)


def test_a_virtiofsd_that_dies_is_named_and_ends_the_machine(sharing: tuple[str, ...], tmp_path: Path) -> None:
    with spawned(*sharing) as machine:
        machine.wait_for("is running")
        qemu = qemu_pid(machine.name)
        pids = servers(machine)
        os.kill(pids[0], signal.SIGKILL)
        assert machine.wait() == 1
    assert f"virtiofsd, which served {tmp_path}/one to the guest, died of SIGKILL" in machine.output["stderr"]
    assert process_is_gone(qemu)
    assert all(process_is_gone(pid) for pid in pids)
    assert is_gone(machine.name)


def test_a_virtiofsd_that_dies_without_a_manager_is_named_and_ends_the_machine(
    sharing: tuple[str, ...], tmp_path: Path
) -> None:
    with survivor(fresh_name(), *sharing) as machine:
        pids = servers(machine.manager)
        machine.kill_manager()
        os.kill(pids[0], signal.SIGKILL)
        wait_until_dead(pids[0])
        assert not process_is_gone(machine.pid)
        done = vmctl("adopt", machine.name)
        reason = f"virtiofsd, which served {tmp_path}/one to the guest, ended while there was no manager"
        assert (done.returncode, done.stdout) == (1, "")
        assert reason in done.stderr
        wait_until_dead(machine.pid)
        assert process_is_gone(machine.pid)
        assert all(process_is_gone(pid) for pid in pids)
        assert is_gone(machine.name)


def test_virtiofsd_ends_with_a_qemu_that_dies(sharing: tuple[str, ...]) -> None:
    with spawned(*sharing) as machine:
        machine.wait_for("is running")
        pids = servers(machine)
        os.kill(qemu_pid(machine.name), signal.SIGKILL)
        assert machine.wait() == 1
    assert "QEMU died of SIGKILL" in machine.output["stderr"]
    assert all(process_is_gone(pid) for pid in pids)


@pytest.mark.parametrize("option", ["--directory=", "--bind="])
def test_a_path_that_is_not_a_directory_is_named(tmp_path: Path, qemu: str, option: str) -> None:
    (tmp_path / "file").touch()
    boot = () if option == "--directory=" else (f"--image={make_raw(tmp_path / 'image')}",)
    for path, reason in (("file", "Not a directory"), ("none", "No such file or directory")):
        done = vmspawn(f"--qemu={qemu}", *boot, f"{option}{tmp_path}/{path}")
        assert done.returncode == 1
        assert f"cannot use {option}{tmp_path}/{path}: {reason}" in done.stderr

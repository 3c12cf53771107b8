# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests adopting a machine that an older vmspawn started, whose sources are in git."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import Spawned, qemu_pid, vmctl
from tests.conftest import make_qcow2, make_raw
from tests.machines import fresh_name, is_gone, process_is_gone
from tests.survivors import wait_until_dead

ROOT = Path(__file__).parents[2]

#: The last commit before the code was divided into layers. Its state has version 3.
OLDER = "4a94d15"


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Return the command `vmspawn` of that commit."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), "archive", OLDER, "src"], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if done.returncode:
        pytest.skip(f"git has no commit {OLDER} here: {done.stderr.decode(errors='replace').strip()}")
    folder = tmp_path_factory.mktemp("older")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=done.stdout, check=True)
    start = f"import sys; sys.path.insert(0, {str(folder / 'src')!r}); from vmspawn.cli.spawn import main; main()"
    return (sys.executable, "-c", start)


def test_a_machine_of_an_older_vmspawn_is_adopted_with_its_disks(
    qemu: str, tmp_path: Path, older: tuple[str, ...]
) -> None:
    name = fresh_name()
    boot = make_raw(tmp_path / "boot", 1 << 20)
    arguments = (f"--qemu={qemu}", f"--image={boot}", "--ram=64M", "--console=headless", "--hotplug-ports=4")
    manager = Spawned(name, arguments, program=older)
    try:
        manager.wait_for("is running")
        pid = qemu_pid(name)
        for path, options in (
            (make_raw(tmp_path / "raw"), ("--bus=virtio-scsi", "--iops=500")),
            (make_qcow2(tmp_path / "qcow2"), ("--bus=virtio-blk", "--format=qcow2")),
        ):
            done = vmctl("attach-disk", name, str(path), *options)
            assert done.returncode == 0, done.stderr
        assert vmctl("qmp", name, "query-status").returncode == 0
        before = disks(name)
    finally:
        manager.process.kill()
        # After this wait, `close` ends only the manager's streams; QEMU stays for the next manager.
        manager.process.wait()
        manager.close()
    adopted = Spawned(name, ("--adopt", "--console=headless"))
    try:
        adopted.wait_for("is running")
        assert qemu_pid(name) == pid
        assert [{key: disk[key] for key in before[0]} for disk in disks(name)] == before
        for disk in ("raw", "qcow2"):
            assert vmctl("replace-disk", name, disk, str(make_raw(tmp_path / f"other-{disk}"))).returncode == 0
        assert vmctl("detach-disk", name, "raw").returncode == 0
        assert vmctl("attach-disk", name, str(tmp_path / "raw"), "--bus=virtio-scsi").returncode == 0
        assert vmctl("qmp", name, "query-status").returncode == 0
        refused = vmctl("exec", name, "true")
        assert refused.returncode == 125
        assert "restart the machine to run commands in it" in refused.stderr
        copies_have_the_disks(name)
        assert vmctl("terminate", name).returncode == 0
        assert adopted.wait() == 0
    finally:
        adopted.close()
    wait_until_dead(pid)
    assert process_is_gone(pid)
    assert is_gone(name)


def copies_have_the_disks(name: str) -> None:
    """Save the machine and start a copy, if QEMU can save the devices that the older vmspawn has added."""
    done = vmctl("snapshot", name, "s")
    if done.returncode:
        assert "QEMU cannot save its NVMe controller, which has no namespace" in done.stderr
        return
    copy = fresh_name()
    done = vmctl("fork", f"{name}@s", copy)
    assert done.returncode == 0, done.stderr
    # The older vmspawn gave its machines no port for an agent.
    assert done.stdout.splitlines()[1] == f"the clock shows the time of the snapshot: no agent runs in {copy}"
    places = [{each["name"]: each["place"] for each in disks(machine)} for machine in (name, copy)]
    assert places[0] == places[1]
    assert vmctl("detach-disk", copy, "raw").returncode == 0
    assert vmctl("terminate", copy, "--wait").returncode == 0
    assert vmctl("remove-snapshot", f"{name}@s").returncode == 0


def disks(name: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(vmctl("list-disks", name, "--json=short").stdout)
    return found

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that a manager keeps working after its package was removed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmspawn
from tests.commands import VMCTL, Spawned, background, qemu_pid, vmctl, vmctl_output
from tests.conftest import make_qcow2, make_raw
from tests.machines import fresh_name, is_gone


@pytest.fixture
def machine(qemu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Spawned]:
    """Run a vmspawn whose package is removed once the machine is up."""
    package = tmp_path / "package"
    shutil.copytree(Path(vmspawn.__file__).parent, package / "vmspawn")
    monkeypatch.setenv("VMSPAWN_CACHE_DIR", str(tmp_path / "cache"))
    run = f"import sys; sys.path.insert(0, {str(package)!r}); from vmspawn.cli.spawn.main import main; main()"
    image = make_raw(tmp_path / "boot", 1 << 20)
    options = (f"--qemu={qemu}", f"--image={image}", "--ram=64M", "--console=headless")
    running = Spawned(fresh_name(), options, program=(sys.executable, "-c", run))
    try:
        running.wait_for("is running")
        shutil.rmtree(package)
        yield running
    finally:
        running.close()


def test_disks_are_attached_changed_and_detached(machine: Spawned, tmp_path: Path) -> None:
    name, raw, qcow2 = machine.name, make_raw(tmp_path / "raw"), make_qcow2(tmp_path / "qcow2")
    vmctl_output("attach-disk", name, str(raw), "--bus=virtio-scsi", "--name=d")
    vmctl_output("limit-disk", name, "d", "--iops=100")
    vmctl_output("replace-disk", name, "d", str(qcow2), "--format=qcow2")
    vmctl_output("resize-disk", name, "d", "128M")
    assert "d" in vmctl_output("list-disks", name)
    vmctl_output("detach-disk", name, "d")
    vmctl_output("attach-disk", name, str(raw), "--name=kept")
    assert vmctl("detach-disk", name, "kept", "--timeout=0.2").returncode == 1
    vmctl_output("detach-disk", name, "kept", "--force", "--timeout=0.2")
    vmdk = tmp_path / "vmdk"
    vmdk.write_bytes(b"KDMV" + bytes(1 << 16))
    refused = vmctl("attach-disk", name, str(vmdk), "--format=vmdk")
    assert refused.returncode == 1
    assert "names other files as its extents" in refused.stderr


def test_media_are_ejected_and_inserted(machine: Spawned, tmp_path: Path) -> None:
    image = make_raw(tmp_path / "iso", 1 << 20)
    vmctl_output("attach-disk", machine.name, "--bus=scsi-cd", "--name=cd", str(image))
    vmctl_output("eject-media", machine.name, "cd")
    vmctl_output("insert-media", machine.name, "cd", str(image))


def test_sessions_events_and_the_console_work(machine: Spawned) -> None:
    name = machine.name
    with background([*VMCTL, "events", name, "--json=short"], stdout=-1, text=True) as events:
        assert events.stdout is not None
        assert "READY" in events.stdout.readline()
        assert json.loads(vmctl_output("qmp", name, "query-status"))["status"] == "running"
        vmctl_output("qmp", name, "--read-only", "query-block")
        vmctl_output("pause", name)
        assert "STOP" in events.stdout.readline()
        vmctl_output("resume", name)
    with background([*VMCTL, "console", name], stdin=subprocess.DEVNULL, stderr=-1, text=True) as console:
        assert console.stderr is not None
        assert "attached to machine" in console.stderr.readline()
        vmctl_output("reboot", name)
    assert name in vmctl_output("status", name)


def test_the_death_of_qemu_is_reported(machine: Spawned, tmp_path: Path) -> None:
    os.kill(qemu_pid(machine.name), signal.SIGKILL)
    assert machine.wait() == 1
    assert "QEMU died of SIGKILL" in machine.output["stderr"]
    assert "Traceback" not in machine.output["stderr"]
    (report,) = (tmp_path / "cache" / "reports").iterdir()
    assert str(report) in machine.output["stderr"]
    assert is_gone(machine.name)


def test_sigterm_asks_the_guest_to_power_off_and_then_ends_the_machine(machine: Spawned) -> None:
    vmctl_output("poweroff", machine.name)
    machine.signal(signal.SIGTERM)
    machine.wait_for("asked the guest to power off")
    machine.signal(signal.SIGTERM)
    assert machine.wait() == 0
    assert "Traceback" not in machine.output["stderr"]

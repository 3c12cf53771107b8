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
from tests.commands import VMCTL, Spawned, background, qemu_pid, vmctl
from tests.conftest import make_qcow2, make_raw
from tests.machines import fresh_name, is_gone


@pytest.fixture
def orphan(qemu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Spawned]:
    """Run a vmspawn whose package is removed when the machine is up."""
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


def done(*arguments: str) -> str:
    found = vmctl(*arguments)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_disks_come_change_and_go(orphan: Spawned, tmp_path: Path) -> None:
    name, raw, qcow2 = orphan.name, make_raw(tmp_path / "raw"), make_qcow2(tmp_path / "qcow2")
    done("attach-disk", name, str(raw), "--bus=virtio-scsi", "--name=d")
    done("limit-disk", name, "d", "--iops=100")
    done("replace-disk", name, "d", str(qcow2), "--format=qcow2")
    done("resize-disk", name, "d", "128M")
    assert "d" in done("list-disks", name)
    done("detach-disk", name, "d")
    done("attach-disk", name, str(raw), "--name=kept")
    assert vmctl("detach-disk", name, "kept", "--timeout=0.2").returncode == 1
    done("detach-disk", name, "kept", "--force", "--timeout=0.2")
    vmdk = tmp_path / "vmdk"
    vmdk.write_bytes(b"KDMV" + bytes(1 << 16))
    refused = vmctl("attach-disk", name, str(vmdk), "--format=vmdk")
    assert refused.returncode == 1
    assert "package" not in refused.stderr


def test_media_come_and_go(orphan: Spawned, tmp_path: Path) -> None:
    image = make_raw(tmp_path / "iso", 1 << 20)
    done("attach-disk", orphan.name, "--bus=scsi-cd", "--name=cd", str(image))
    done("eject-media", orphan.name, "cd")
    done("insert-media", orphan.name, "cd", str(image))


def test_sessions_events_and_the_console(orphan: Spawned) -> None:
    name = orphan.name
    with background([*VMCTL, "events", name, "--json=short"], stdout=-1, text=True) as events:
        assert events.stdout is not None
        assert "READY" in events.stdout.readline()
        assert json.loads(done("qmp", name, "query-status"))["status"] == "running"
        done("qmp", name, "--read-only", "query-block")
        done("pause", name)
        assert "STOP" in events.stdout.readline()
        done("resume", name)
    with background([*VMCTL, "console", name], stdin=subprocess.DEVNULL, stderr=-1, text=True) as console:
        assert console.stderr is not None
        assert "attached to machine" in console.stderr.readline()
        done("reboot", name)
    assert name in done("status", name)


def test_qemu_dies_and_is_reported(orphan: Spawned, tmp_path: Path) -> None:
    os.kill(qemu_pid(orphan.name), signal.SIGKILL)
    assert orphan.wait() == 1
    assert "QEMU died of SIGKILL" in orphan.output["stderr"]
    assert "Traceback" not in orphan.output["stderr"]
    (report,) = (tmp_path / "cache" / "reports").iterdir()
    assert str(report) in orphan.output["stderr"]
    assert is_gone(orphan.name)


def test_the_guest_is_asked_to_power_off_and_ended(orphan: Spawned) -> None:
    done("poweroff", orphan.name)
    orphan.signal(signal.SIGTERM)
    orphan.wait_for("asked the guest to power off")
    orphan.signal(signal.SIGTERM)
    assert orphan.wait() == 0
    assert "Traceback" not in orphan.output["stderr"]

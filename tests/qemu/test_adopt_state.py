# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the state that a manager leaves: of any version, damaged, or outdated."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands import vmctl, vmspawn
from tests.conftest import make_raw
from tests.machines import fresh_name, process_is_gone
from tests.survivors import Survivor, idle_survivor, survivor
from vmspawn.boot.state import STATE_VERSION
from vmspawn.host import runtime


@pytest.fixture
def machine(qemu: str, tmp_path: Path) -> Iterator[Survivor]:
    with idle_survivor(qemu, tmp_path) as running:
        yield running


def edit_state(machine: Survivor, **changes: Any) -> None:
    path = Path(machine.folder) / runtime.STATE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_newer_state_is_refused_and_qemu_lives(machine: Survivor) -> None:
    machine.kill_manager()
    edit_state(machine, version=STATE_VERSION + 1)
    done = vmspawn("--adopt", "-M", machine.name)
    assert done.returncode == 1
    assert f"machine {machine.name} belongs to a newer vmspawn" in done.stderr
    assert not process_is_gone(machine.pid)
    edit_state(machine, version=STATE_VERSION)
    machine.adopt()


def plug_in_with_long_names(machine: Survivor, path: Path, *, threaded: bool) -> None:
    """Attach a SCSI disk as managers with state of version 1 or 2 did, with its controller."""
    pivot = {"driver": "throttle", "node-name": "drive5-pivot", "throttle-group": "drive5-limits"}
    disk = {"driver": "scsi-hd", "id": "drive5", "drive": "drive5-pivot", "serial": "disk", "scsi-id": 3, "lun": 0}
    controller = {"driver": "virtio-scsi-pci", "id": "scsi1", "iothread": "scsi-thread", "bus": "port0", "addr": "0x0"}
    commands: list[tuple[str, dict[str, Any]]] = [
        ("object-add", {"qom-type": "throttle-group", "id": "drive5-limits"}),
        ("blockdev-add", {"driver": "file", "node-name": "image4-file", "filename": str(path)}),
        ("blockdev-add", {**pivot, "file": "image4-file"}),
        ("device_add", {**disk, "bus": "scsi1.0" if threaded else "scsi0.0"}),
    ]
    if threaded:
        commands[:0] = [
            ("object-add", {"qom-type": "iothread", "id": "scsi-thread"}),
            ("device_add", controller),
        ]
    with machine.monitor() as monitor:
        for command, arguments in commands:
            assert monitor.execute(command, **arguments) == {"return": {}}


def state_of_version(version: int, machine: Survivor, path: Path) -> dict[str, Any]:
    """Return the state that a manager of that version wrote for a machine with that disk.

    Version 1 has fewer members, and not the place of the controller with an I/O thread.
    """
    found = json.loads((Path(machine.folder) / runtime.STATE).read_text())
    options = {"read-only": False, "discard": "unmap", "detect-zeroes": "off", "cache": "writeback", "aio": "threads"}
    status = path.stat()
    backing = {"block": False, "writable": True, "identity": [status.st_dev, status.st_ino]}
    image = {"number": 4, "format": "raw", "path": str(path), "size": 0, "done": ["file"], "backing": backing}
    disk = {
        "name": "disk",
        "bus": "virtio-scsi",
        "options": {**options, "thread": version == 1, "share": False},
        "serial": "disk",
        "limits": [0, 0, 0, 0, 0, 0, 1.0],
        "boot": False,
        "number": 5,
        "place": ["scsi1" if version == 1 else "scsi0", 3, 0],
        "images": [image],
        "state": "attached",
        "done": ["place", "limits", "image", "pivot", "device"],
    }
    disks = {"next": 6, "attachments": [disk]}
    if version == 2:
        return {**found, "version": 2, "storage": {**disks, "threaded-scsi": None}}
    return {
        "version": 1,
        "name": machine.name,
        "qemu": {name: found["qemu"][name] for name in ("pid", "started", "path")},
        "machine": {"type": "q35", "hotplug-ports": 4},
        "storage": disks,
    }


@pytest.mark.parametrize("version", [1, 2])
def test_an_older_state_is_read(qemu: str, tmp_path: Path, version: int) -> None:
    path = make_raw(tmp_path / "disk", 1 << 20)
    with survivor(
        fresh_name(), f"--qemu={qemu}", "--guest=builtin", "--console=headless", "--hotplug-ports=4"
    ) as machine:
        machine.kill_manager()
        plug_in_with_long_names(machine, path, threaded=version == 1)
        state = Path(machine.folder) / runtime.STATE
        state.write_text(json.dumps(state_of_version(version, machine, path)))
        machine.adopt()
        (disk,) = machine.disks()
        assert (disk["name"], disk["state"], disk["path"]) == ("disk", "attached", str(path))
        assert disk["sizeBytes"] == 1 << 20
        written = json.loads(state.read_text())
        assert written["version"] == STATE_VERSION
        assert written["storage"]["threaded-scsi"] == (["port0", "0x0"] if version == 1 else None)
        # This manager and the next one manage the disk like any other.
        other = make_raw(tmp_path / "other", 1 << 20)
        assert vmctl("replace-disk", machine.name, "disk", str(other)).returncode == 0
        machine.attach(make_raw(tmp_path / "another"), "--bus=virtio-scsi", "--iothread")
        assert json.loads(vmctl("status", machine.name, "--json=short").stdout)["portsFree"] == 3
        machine.kill_manager()
        machine.adopt()
        for name in ("disk", "another"):
            assert vmctl("detach-disk", machine.name, name).returncode == 0
        machine.kill_manager()
        with machine.monitor() as monitor:
            assert monitor.execute("query-named-block-nodes") == {"return": []}
            objects = monitor.execute("qom-list", path="/objects")["return"]
            assert not [each["name"] for each in objects if each["name"].startswith(("drive", "limits"))]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"version": 2}', b'{"version": "x"}'])
def test_a_damaged_state_is_reported(machine: Survivor, damage: bytes) -> None:
    machine.kill_manager()
    path = Path(machine.folder) / runtime.STATE
    whole = path.read_bytes()
    path.write_bytes(damage)
    done = vmspawn("--adopt", "-M", machine.name)
    assert done.returncode == 1
    assert f"the state of machine {machine.name} is damaged" in done.stderr
    assert "Traceback" not in done.stderr
    # The state does not look like leftovers that can be removed.
    assert "still runs without its manager" in vmspawn("-M", machine.name, "--guest=builtin").stderr
    path.write_bytes(whole)
    machine.adopt()


def test_qemu_is_found_if_its_process_id_is_not_in_the_state(machine: Survivor) -> None:
    """The state is written before QEMU starts. A manager that finds no process id in the state asks QEMU's monitor."""
    machine.kill_manager()
    state = json.loads((Path(machine.folder) / runtime.STATE).read_text())
    edit_state(machine, qemu={**state["qemu"], "pid": 0, "started": 0})
    machine.adopt()
    assert json.loads(vmctl("status", machine.name, "--json=short").stdout)["processId"] == machine.pid


def test_qemus_binary_may_change_while_a_machine_runs(machine: Survivor) -> None:
    """After an upgrade, the binary is not the one that runs, so the state has the capabilities of the running QEMU."""
    machine.kill_manager()
    state = json.loads((Path(machine.folder) / runtime.STATE).read_text())
    edit_state(machine, qemu={**state["qemu"], "path": shutil.which("true")})
    machine.adopt()
    assert json.loads(vmctl("status", machine.name, "--json=short").stdout)["running"] is True

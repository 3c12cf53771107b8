# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the information that a machine offers for finding a fault."""

import asyncio
import json
import os
import re
import stat
from pathlib import Path

import pytest

from tests.commands import spawned, vmctl
from tests.conftest import make_raw
from tests.machines import fresh_name, idle_machine, is_gone, process_is_gone
from tests.survivors import survivor, wait_until_dead
from vmspawn import MachineConfig
from vmspawn.boot.adopt import adopt
from vmspawn.boot.launch import launch
from vmspawn.console.messages import Messages
from vmspawn.errors import ManagerFailed
from vmspawn.machine.running import run
from vmspawn.manager.report import REPORTS_MAX
from vmspawn.manager.supervisor import supervise


def arguments(qemu: str, folder: Path) -> tuple[str, ...]:
    image = make_raw(folder / "boot", 1 << 20)
    return (f"--qemu={qemu}", f"--image={image}", "--ram=64M", "--console=headless")


def test_a_transcript_has_all_messages_without_secrets(qemu: str, tmp_path: Path) -> None:
    path = tmp_path / "qmp.log"
    with spawned(*arguments(qemu, tmp_path), f"--qmp-log={path}") as machine:
        machine.wait_for("is running")
        assert vmctl("qmp", machine.name, "query-status").returncode == 0
        secret = ["qom-type=secret", "id=key0", "data=hush-hush"]
        done = vmctl("qmp", machine.name, "object-add", *secret)
        assert done.returncode == 0, done.stderr
        asked = vmctl("qmp", machine.name, "qom-get", "path=/objects/key0", "property=data")
        assert "hush-hush" in asked.stdout
        assert vmctl("qmp", machine.name, "human-monitor-command", "command-line=info version").returncode == 0
        disk = make_raw(tmp_path / "disk")
        assert vmctl("attach-disk", machine.name, str(disk), "--bus=virtio-scsi").returncode == 0
    text = path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert re.search(r' manager -> {"execute":"device_add"', text)
    assert re.search(r' sessions -> {"execute":"query-status"', text)
    assert re.search(r' sessions <- {"return": .*"running"', text)
    assert "hush-hush" not in text
    assert '"data":"(left out)"' in text
    assert re.search(r' sessions <- {"return": "\d+\.\d+', text)


def test_a_transcript_that_cannot_be_written_is_reported_and_nothing_is_left(qemu: str, tmp_path: Path) -> None:
    with spawned(*arguments(qemu, tmp_path), "--qmp-log=/nowhere/qmp.log") as machine:
        assert machine.wait() == 2
        assert "cannot write --qmp-log=/nowhere/qmp.log: No such file" in machine.output["stderr"]
    assert is_gone(machine.name)


def test_status_shows_sessions_errors_and_events(qemu: str, tmp_path: Path) -> None:
    with spawned(*arguments(qemu, tmp_path)) as machine:
        machine.wait_for("is running")
        assert vmctl("detach-disk", machine.name, "nobody").returncode == 1
        assert vmctl("pause", machine.name).returncode == 0
        found = json.loads(vmctl("status", machine.name, "--json=short").stdout)
        assert (found["sessions"], found["status"]) == (0, "paused")
        assert "there is no disk named nobody" in found["lastError"]["text"]
        assert [each["text"] for each in found["recentEvents"]][-1] == "STOP"
        shown = vmctl("status", machine.name).stdout
    for word in ("State: paused", "free", "Sessions: 0", "Last error: ", "no disk named nobody", "STOP", "tcg"):
        assert word in shown
    ports = f"Ports: {found['portsFree']} of {found['ports']} free"
    for line in (r"Up: \d", rf"QEMU: {found['qemuVersion']}, ", ports, "Disks: boot", r"Events: \d\d:\d\d:\d\d"):
        assert re.search(rf"^ *{line}", shown, re.MULTILINE), shown


def test_debug_shows_the_steps(qemu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMSPAWN_LOG", "debug")
    with spawned(*arguments(qemu, tmp_path)) as machine:
        machine.wait_for("is running")
        disk = make_raw(tmp_path / "disk")
        assert vmctl("attach-disk", machine.name, str(disk), "--bus=virtio-scsi").returncode == 0
        machine.wait_for("event StorageAttached name=disk")
    assert re.search(r"disk: does .*, device$", machine.output["stderr"], re.MULTILINE)
    assert " runs " in machine.output["stderr"]
    assert "-blockdev" in machine.output["stderr"]


def test_a_qemu_that_died_leaves_a_report(qemu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report names the files to attach to a bug; the oldest of many reports is removed."""
    monkeypatch.setenv("VMSPAWN_CACHE_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "reports"
    folder.mkdir(parents=True)
    for number in range(REPORTS_MAX):
        (folder / f"{number}.txt").touch()
        os.utime(folder / f"{number}.txt", (number, number))
    log = tmp_path / "qmp.log"
    with survivor(fresh_name(), *arguments(qemu, tmp_path), f"--qmp-log={log}") as machine:
        machine.kill_qemu()
        assert machine.manager.wait() == 1
        said = re.search(r"a report is in (\S+)", machine.manager.output["stderr"])
        assert said
        report = Path(said[1]).read_text()
    assert report.startswith("QEMU died of SIGKILL")
    assert f"machine {machine.name}, q35, process {machine.pid} of QEMU" in report
    assert '"attachments"' in report
    assert f"To report this fault, attach this file\n  and {log}, " in report
    assert len(list(folder.iterdir())) == REPORTS_MAX
    assert not (folder / "0.txt").exists()


async def test_a_manager_that_fails_leaves_its_guest_running_and_a_report(
    qemu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault is in an object that the supervisor is given, and could be in any of its parts."""
    monkeypatch.setenv("VMSPAWN_CACHE_DIR", str(tmp_path / "cache"))
    name = fresh_name()
    config = idle_machine(qemu, tmp_path, name=name).config
    launched = launch(config)
    pid = launched.pid

    class Broken(Messages):
        def notice(self, line: str) -> None:
            raise LookupError(f"a fault of ours\nin {line}")

    with pytest.raises(ManagerFailed) as caught:
        await supervise(launched, Broken("vmspawn", quiet=False))
    assert str(caught.value).startswith("the manager failed: LookupError: a fault of ours; the machine continues")
    assert f"vmctl adopt {name}" in str(caught.value)
    report = await asyncio.to_thread(Path(caught.value.hint.rpartition(" ")[2]).read_text)
    assert "Traceback (most recent call last)" in report
    assert not process_is_gone(pid)
    machine = await run(adopt(MachineConfig(name=name, console="headless")))
    assert machine.pid == pid
    await machine.terminate()
    await machine.wait()
    await machine.end()
    wait_until_dead(pid)


def test_a_manager_works_without_a_reader_of_its_output(qemu: str, tmp_path: Path) -> None:
    with survivor(fresh_name(), *arguments(qemu, tmp_path)) as machine:
        machine.manager.hang_up("stderr")
        assert vmctl("terminate", machine.name).returncode == 0
        assert machine.manager.wait() == 0
        assert process_is_gone(machine.pid)

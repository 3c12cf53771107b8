# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests vmspawn and vmctl as processes, on a real QEMU without a guest, and their one-line errors."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import (
    DEADLINE,
    VMCTL,
    VMSPAWN,
    Spawned,
    background,
    idle,
    make_script,
    one_line,
    qemu_pid,
    spawned,
    vmctl,
    vmspawn,
)
from tests.conftest import MIB, make_qcow2, make_raw
from tests.imagefiles import make
from tests.machines import is_gone, process_is_gone
from tests.qemu.qmp_fixtures import wait_until
from tests.survivors import wait_until_dead
from vmspawn.host import runtime


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_raw(tmp_path_factory.mktemp("image") / "image", 1 << 20)


@pytest.fixture(scope="module")
def machine(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spawned]:
    with idle(qemu, tmp_path_factory.mktemp("image")) as running:
        yield running


def test_a_machine_starts_and_leaves_nothing_when_terminated(qemu: str, image: Path) -> None:
    with spawned(f"--qemu={qemu}", f"--image={image}", "--ram=64M") as running:
        running.wait_for("is running")
        pid = qemu_pid(running.name)
        assert vmctl("terminate", running.name).returncode == 0
        assert running.wait() == 0
    assert "the machine was terminated" in running.output["stderr"]
    assert is_gone(running.name)
    assert process_is_gone(pid)


def test_qemu_prints_no_warning_and_verbose_reports_disabled_features(qemu: str, image: Path) -> None:
    options = ("--verbose", "--tpm=auto", "--console=headless")
    with spawned(f"--qemu={qemu}", f"--image={image}", "--ram=64M", *options) as running:
        running.wait_for("is running")
        log = Path(runtime.runtime_root(), running.name, runtime.LOG)
        assert log.read_text() == ""
    assert "--tpm=auto: a TPM is not supported yet" in running.output["stderr"]
    assert "no UEFI firmware is installed, so the machine boots by BIOS" in running.output["stderr"]


@pytest.mark.parametrize(("choice", "kept"), [("yes", False), ("no", True)])
def test_discarded_data_is_freed_or_kept(qemu: str, tmp_path: Path, choice: str, kept: bool) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x" * MIB)
    before = image.stat().st_blocks
    options = ("--ram=64M", "--console=headless", f"--discard-disk={choice}")
    with spawned(f"--qemu={qemu}", f"--image={image}", *options) as running:
        running.wait_for("is running")
        found = json.loads(vmctl("qmp", running.name, "query-block").stdout)
        device = next(each["qdev"] for each in found if each["qdev"].startswith("/machine/peripheral/"))
        # The discard goes to the device's own node, as the guest's would.
        command = f'command-line=qemu-io -d {device} "discard 0 1M"'
        assert vmctl("qmp", running.name, "human-monitor-command", command).returncode == 0
    assert (image.stat().st_blocks == before) is kept


def test_quiet_prints_nothing(qemu: str, image: Path) -> None:
    with spawned("-q", f"--qemu={qemu}", f"--image={image}", "--ram=64M", "--console=headless") as running:
        wait_until(lambda: vmctl("status", running.name).returncode == 0, "an answer to vmctl", running.process)
        vmctl("terminate", running.name)
        assert running.wait() == 0
    assert running.output == {"stdout": "", "stderr": ""}


def test_a_guest_that_does_not_power_off_in_time_is_ended(qemu: str, image: Path) -> None:
    with spawned(f"--qemu={qemu}", f"--image={image}", "--ram=64M", "--shutdown-timeout=0.5") as running:
        running.wait_for("is running")
        running.signal(signal.SIGTERM)
        assert running.wait() == 0
    assert "the guest did not power off within 0.5 s" in running.output["stderr"]
    assert is_gone(running.name)


def test_qemus_death_is_reported_and_cleaned_up(qemu: str, image: Path) -> None:
    with spawned(f"--qemu={qemu}", f"--image={image}", "--ram=64M") as running:
        running.wait_for("is running")
        os.kill(qemu_pid(running.name), signal.SIGKILL)
        assert running.wait() == 1
    assert "vmspawn: QEMU died of SIGKILL" in running.output["stderr"]
    assert is_gone(running.name)


def test_qemu_outlives_a_manager_that_is_killed_and_keeps_its_name(qemu: str, image: Path) -> None:
    with spawned(f"--qemu={qemu}", f"--image={image}", "--ram=64M") as running:
        running.wait_for("is running")
        pid = qemu_pid(running.name)
        running.process.kill()
        running.wait()
    try:
        done = vmspawn("-M", running.name, f"--qemu={qemu}", f"--image={image}")
        assert done.returncode == 1
        assert f"QEMU is process {pid}" in one_line(done, "vmspawn")
        assert vmctl("status", running.name).stderr.splitlines() == [
            f"vmctl: machine {running.name} runs without a manager (QEMU is process {pid})",
            f"       adopt it with: vmctl adopt {running.name}",
        ]
    finally:
        os.kill(pid, signal.SIGKILL)
        wait_until_dead(pid)
    with spawned(f"--qemu={qemu}", f"--image={image}", "--ram=64M", name=running.name) as again:
        again.wait_for("is running")
    assert is_gone(running.name)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "nothing to boot"),
        (["--nonsense"], 2, "--nonsense"),
        (["--image={image}", "-M", "../up"], 2, "invalid machine name '../up'"),
        (["--image={image}", "--ram=lots"], 2, "--ram=lots is not a size"),
        (["--image={image}", "--cpus=many"], 2, "--cpus"),
        (["--image={image}", "--hotplug-ports=500"], 2, "--hotplug-ports=500 is out of range"),
        (["--image={image}", "--machine-type=pc", "--hotplug-ports=40"], 2, "out of range for the machine type pc"),
        (["--image={image}", "--extra-drive=nvme:"], 2, "names no path"),
        (["--image={image}", "--kvm=yes"], 2, "--kvm=yes, but"),
        (["--image={image}", "--qemu=/proc/nonexistent/qemu"], 1, "cannot use QEMU /proc/nonexistent/qemu: not found"),
        (["--image={image}", "--qemu={image}"], 1, "not executable"),
        (["--image={image}", "--qemu=/bin/true"], 1, "/bin/true is not QEMU"),
        (["--image={image}", "--qemu={old}"], 1, "is QEMU 6.2.0, which is too old"),
        (["--image=/proc/nonexistent"], 1, "cannot use --image=/proc/nonexistent: No such file or directory"),
        (["--image=/tmp"], 1, "/tmp is a directory"),
        (["--image={empty}"], 1, "the image is empty"),
        (["--image={qcow2}"], 1, "looks like qcow2"),
        (["--image={vhd}"], 1, "looks like vpc"),
        (["--image={image}", "--image-format=qcow2"], 1, "is not in qcow2 format"),
        (["--image={image}", "--extra-drive={image}"], 2, "two disks are named image"),
        (["--image={image}", "--extra-drive={link}"], 1, "the same file as another disk"),
        (["--linux=/proc/nonexistent"], 1, "cannot use --linux=/proc/nonexistent: No such file or directory"),
        (["--linux={empty}"], 1, "the file is empty"),
        (["--linux={image}", "--initrd=/proc/nonexistent"], 1, "cannot use --initrd=/proc/nonexistent"),
        (["--image={image}", "--qemu-arg=-nonsense"], 1, "QEMU could not start: -nonsense: invalid option"),
        (["--image={image}", "--qemu-arg=-device", "--qemu-arg=nonsense"], 1, "QEMU could not start"),
    ],
)
def test_a_failed_start_is_reported_in_one_line(
    qemu: str, image: Path, tmp_path: Path, arguments: list[str], status: int, message: str
) -> None:
    names = {
        "image": str(image),
        "empty": str(make_raw(tmp_path / "empty", 0)),
        "qcow2": str(make_qcow2(tmp_path / "qcow2")),
        "vhd": str(make(tmp_path / "vhd", "vpc")),
        "link": str(tmp_path / "link"),
        "old": str(make_script(tmp_path / "old", "echo QEMU emulator version 6.2.0")),
    }
    os.symlink(image, names["link"])
    filled = [argument.format(**names) for argument in arguments]
    explicit = [] if any(argument.startswith("--qemu=") for argument in filled) else [f"--qemu={qemu}"]
    name = [] if "-M" in filled else ["-M", "broken"]
    done = vmspawn(*explicit, *name, *filled)
    assert done.returncode == status, done.stderr
    assert message in one_line(done, "vmspawn")
    assert is_gone("broken")


def test_a_qemu_that_cannot_be_executed_is_named(image: Path, tmp_path: Path) -> None:
    broken = tmp_path / "qemu"
    broken.write_bytes(b"\x7fELF nonsense")
    broken.chmod(0o755)
    done = vmspawn(f"--qemu={broken}", f"--image={image}")
    assert (done.returncode, one_line(done, "vmspawn")) == (1, f"vmspawn: cannot run QEMU {broken}: Exec format error")


def test_an_image_that_another_machine_uses_is_named(machine: Spawned, qemu: str) -> None:
    boot = json.loads(vmctl("list-disks", machine.name, "--json=short").stdout)[0]["path"]
    done = vmspawn(f"--qemu={qemu}", f"--image={boot}", "-M", "second")
    assert done.returncode == 1
    assert f"cannot use {boot}: machine {machine.name} uses the image" in one_line(done, "vmspawn")
    assert is_gone("second")


def test_a_name_in_use_is_refused(machine: Spawned, qemu: str, image: Path) -> None:
    done = vmspawn(f"--qemu={qemu}", f"--image={image}", "-M", machine.name)
    assert (done.returncode, one_line(done, "vmspawn")) == (
        1,
        f"vmspawn: a machine named {machine.name} is already running",
    )
    assert vmctl("status", machine.name).returncode == 0


def test_vmctl_lists_the_machine_as_a_table_and_as_json(machine: Spawned) -> None:
    table = vmctl("list").stdout.splitlines()
    assert table[0].split() == ["MACHINE", "STATE", "QEMU", "ACCEL", "PID"]
    assert any(line.split()[:2] == [machine.name, "running"] for line in table[1:])
    found = json.loads(vmctl("list", "--json=short").stdout)
    assert [entry["status"] for entry in found if entry["name"] == machine.name] == ["running"]


def test_vmctl_pauses_and_resumes(machine: Spawned) -> None:
    for verb, status in (("pause", "paused"), ("resume", "running")):
        assert vmctl(verb, machine.name).returncode == 0
        assert json.loads(vmctl("status", machine.name, "-j").stdout)["status"] == status


def test_vmctl_attaches_lists_and_detaches(machine: Spawned, tmp_path: Path) -> None:
    path = make_raw(tmp_path / "data.raw")
    done = vmctl("attach-disk", machine.name, str(path), "--bus=virtio-scsi", "--read-only")
    assert (done.returncode, done.stderr) == (0, "")
    assert "/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_data.raw" in done.stdout
    row = next(
        line for line in vmctl("list-disks", "-l", machine.name).stdout.splitlines() if line.startswith("data.raw")
    )
    assert row.split()[:4] == ["data.raw", "virtio-scsi", "64M", "attached"]
    assert row.split()[5:7] == ["ro", "raw"]
    assert vmctl("detach-disk", machine.name, "data.raw").stdout == "Detached data.raw\n"
    assert json.loads(vmctl("list-disks", machine.name, "--json=short").stdout)[0]["boot"] is True


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (
            ["attach-disk", "{machine}", "/proc/nonexistent"],
            1,
            "cannot attach /proc/nonexistent: No such",
        ),
        (["attach-disk", "{machine}", "/tmp"], 1, "cannot attach /tmp: /tmp is a directory"),
        (["attach-disk", "{machine}", "{image}", "--bus=floppy"], 2, "invalid choice: 'floppy'"),
        (["attach-disk", "{machine}"], 2, "no image"),
        (["attach-disk", "{machine}", "{boot}", "--name=x"], 1, "this file is attached already, as boot"),
        (["detach-disk", "{machine}", "nobody"], 1, "cannot detach nobody: there is no disk named nobody"),
        (["detach-disk", "{machine}", "boot"], 1, "is a boot disk"),
        (["detach-disk", "{machine}", "image", "--timeout=soon"], 2, "--timeout"),
        (["attach-disk", "{machine}", "{image}", "--timeout=0"], 2, "--timeout=0 leaves attach-disk no time"),
        (["status", "{machine}", "--timeout=0"], 2, "--timeout=0 leaves status no time"),
        (["pause", "{machine}", "--timeout=0"], 2, "cannot pause {machine}: --timeout=0 leaves pause no time"),
        (["snapshot", "{machine}", "--timeout=0"], 2, "--timeout=0 leaves snapshot no time"),
        (["fork", "{machine}", "--timeout=0"], 2, "--timeout=0 leaves fork no time"),
        (["adopt", "{machine}", "--timeout=0"], 2, "--timeout=0 leaves adopt no time"),
        (["qmp", "--timeout=0", "{machine}", "query-status"], 2, "--timeout=0 leaves qmp no time"),
        (["status", "nobody"], 1, "there is no machine named nobody"),
        (["status", "../up"], 2, "invalid machine name"),
        (["dance", "{machine}"], 2, "there is no verb dance"),
        ([], 2, "VERB"),
    ],
)
def test_a_failed_verb_is_reported_in_one_line(
    machine: Spawned, image: Path, arguments: list[str], status: int, message: str
) -> None:
    boot = json.loads(vmctl("list-disks", machine.name, "--json=short").stdout)[0]["path"]
    done = vmctl(*(argument.format(machine=machine.name, image=image, boot=boot) for argument in arguments))
    assert done.returncode == status, done.stderr
    assert message.format(machine=machine.name) in one_line(done, "vmctl")
    assert done.stdout == ""


def test_status_takes_the_only_machine(
    qemu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("VMSPAWN_RUNTIME_DIR", str(tmp_path_factory.mktemp("r")))
    none = vmctl("status")
    assert (none.returncode, one_line(none, "vmctl")) == (2, "vmctl: no machine is running")
    with idle(qemu, tmp_path) as first:
        assert vmctl("status").stdout.splitlines()[0].split() == ["Machine:", first.name]
        (tmp_path / "2").mkdir()
        with idle(qemu, tmp_path / "2") as second:
            several = vmctl("status")
            assert (several.returncode, one_line(several, "vmctl")) == (2, "vmctl: 2 machines are running")
            assert all(name in several.stderr for name in (first.name, second.name))


def test_events_are_shown_until_the_machine_ends(qemu: str, image: Path) -> None:
    with spawned(f"--qemu={qemu}", f"--image={image}", "--ram=64M", "--console=headless") as running:
        running.wait_for("is running")
        command = [*VMCTL, "events", running.name, "--json=short", "--filter=STOP,SHUTDOWN"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watcher:
            assert watcher.stdout is not None
            assert json.loads(watcher.stdout.readline()) == {"event": "READY"}
            vmctl("pause", running.name)
            assert json.loads(watcher.stdout.readline())["event"] == "STOP"
            vmctl("terminate", running.name)
            rest = [json.loads(line) for line in watcher.stdout]
            assert [event["event"] for event in rest] == ["SHUTDOWN"]
            assert watcher.wait(timeout=20) == 0


def test_a_filter_for_an_event_that_qemu_lacks_gets_a_warning(machine: Spawned) -> None:
    command = [*VMCTL, "events", machine.name, "--filter=STOP,STPO,StorageAttached"]
    with background(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None
        assert watcher.stderr is not None
        assert watcher.stdout.readline().endswith("READY\n")
        watcher.terminate()
        assert watcher.stderr.read() == "vmctl: QEMU has no event STPO; did you mean STOP?\n"


def test_sigterm_at_any_moment_of_a_start_leaves_nothing(qemu: str, image: Path) -> None:
    """Before there is anything to undo, the signal ends the process; later it ends the machine without a failure."""
    options = (f"--qemu={qemu}", f"--image={image}", "--ram=64M", "--shutdown-timeout=0")
    begun = time.monotonic()
    with spawned(*options) as running:
        running.wait_for("is running")
        step = (time.monotonic() - begun) / 30
    moment, killed, ended = 0.0, 0, 0
    while ended < 10:
        with background(
            [*VMSPAWN, "-M", "early", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            # The moment of the signal is the parameter, so there is nothing to wait for.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=moment)
            process.terminate()
            said = process.communicate(timeout=DEADLINE)[1]
        assert "Traceback" not in said
        assert is_gone("early")
        if process.returncode == -signal.SIGTERM:
            killed += 1
        else:
            assert (process.returncode, said.splitlines()[-1]) == (0, "vmspawn: the machine was terminated")
            ended += 1
        # The steps grow, so that the moments pass the end of a start that a busy host makes longer.
        moment += max(step, moment / 10)
    assert killed

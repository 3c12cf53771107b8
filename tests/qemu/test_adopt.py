# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests adopting a machine whose manager was killed, and the errors if that is impossible."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.commands import DEADLINE, NOTHING_TO_BOOT, SERIAL_BIOS, VMCTL, Spawned, background, vmctl, vmspawn
from tests.conftest import make_qcow2, make_raw
from tests.machines import fresh_name, is_gone, process_is_gone
from tests.qemu.qmp_fixtures import Client, wait_until
from tests.survivors import RawMonitor, Survivor, idle_survivor, survivor, wait_until_dead
from vmspawn.console.unread import MISSING
from vmspawn.host import runtime
from vmspawn.host.consolelog import KEPT_MAX, ConsoleLog


@pytest.fixture
def machine(qemu: str, tmp_path: Path) -> Iterator[Survivor]:
    with idle_survivor(qemu, tmp_path) as running:
        yield running


def test_disks_keep_their_names_places_and_serials(machine: Survivor, tmp_path: Path) -> None:
    machine.attach(make_raw(tmp_path / "one"), "--bus=virtio-blk", "--discard=ignore")
    machine.attach(make_qcow2(tmp_path / "two"), "--bus=nvme", "--format=qcow2", "--serial=TWO")
    machine.attach(make_raw(tmp_path / "three"), "--bus=virtio-scsi", "--iops=100", "--burst=3", "--iothread")
    done = vmctl("attach-disk", machine.name, "--bus=scsi-cd", "--name=empty")
    assert done.returncode == 0, done.stderr
    before = machine.disks()
    machine.kill_manager()
    assert not process_is_gone(machine.pid)
    listed = vmctl("list").stdout
    ours = next(line.split() for line in listed.splitlines() if machine.name in line)
    assert ours == [machine.name, "no", "manager", "-", "-", str(machine.pid)]
    machine.adopt()
    assert machine.disks() == before
    status = json.loads(vmctl("status", machine.name, "--json=short").stdout)
    # Of four ports, two have disks, and one has the SCSI controller with an I/O thread.
    assert (status["processId"], status["portsFree"], status["accelerator"]) == (machine.pid, 1, "tcg")
    for name in ("three", "empty"):
        assert vmctl("detach-disk", machine.name, name).returncode == 0
    machine.attach(tmp_path / "three", "--bus=virtio-scsi")


def test_vmctl_adopt_starts_a_manager_in_the_background(machine: Survivor) -> None:
    machine.kill_manager()
    done = vmctl("adopt", machine.name)
    assert (done.returncode, done.stdout) == (0, f"Adopted {machine.name}\n")
    again = vmctl("adopt", machine.name)
    found = re.fullmatch(rf"vmctl: machine {machine.name} is run by process (\d+)", again.stderr.splitlines()[0])
    assert again.returncode == 1
    assert found
    assert "vmspawn" in Path(f"/proc/{found[1]}/cmdline").read_text()
    assert vmctl("terminate", machine.name).returncode == 0
    wait_until_dead(machine.pid)


#: Verbs of vmctl that keep running, with the stream and the text that each prints when it is connected.
WATCHERS = (
    (("console",), "stderr", "attached to machine"),
    (("events",), "stdout", "READY"),
    (("qmp", "--stdio"), "stdout", "QMP"),
    (("poweroff", "--wait"), "stderr", "the power button was pressed"),
)


def test_verbs_that_keep_running_report_that_the_machine_continues(machine: Survivor) -> None:
    """Each verb reports that it has lost the manager, and hints at the next command."""
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with contextlib.ExitStack() as stack:
        running = []
        for (verb, *options), output, sign in WATCHERS:
            process = stack.enter_context(background([*VMCTL, verb, machine.name, *options], **pipe))
            assert sign in getattr(process, output).readline()
            running.append(process)
        machine.kill_manager()
        for process in running:
            assert process.wait(timeout=DEADLINE) == 1
            assert process.stderr is not None
            *_, said, hint = process.stderr.read().splitlines()
            assert said.endswith(f"the manager of machine {machine.name} has ended; the machine continues")
            assert hint.strip() == f"adopt it with: vmctl adopt {machine.name}"


def test_an_adoption_that_fails_for_its_log_can_be_repeated(machine: Survivor) -> None:
    machine.kill_manager()
    done = vmspawn("--adopt", "-M", machine.name, "--console=headless", "--log=/proc/nonexistent/log")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "cannot use --log=/proc/nonexistent/log: No such file or directory" in done.stderr
    machine.adopt()


def test_a_living_manager_keeps_its_machine(machine: Survivor) -> None:
    done = vmspawn("--adopt", "-M", machine.name)
    assert done.returncode == 1
    assert f"machine {machine.name} is run by process {machine.manager.process.pid}" in done.stderr
    assert machine.disks()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--adopt",), 2, "--adopt needs the name of a machine"),
        (("--adopt", "-M", "../x"), 2, "invalid machine name"),
        (("--adopt", "-M", "nobody"), 1, "there is no machine named nobody"),
        (("--adopt", "-M", "nobody", "quiet"), 2, "--adopt starts no kernel"),
        (("--adopt", "--adopt-or-start", "-M", "nobody"), 2, "not allowed with argument"),
    ],
)
def test_an_impossible_adoption_is_reported(arguments: tuple[str, ...], status: int, message: str) -> None:
    done = vmspawn(*arguments)
    assert done.returncode == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_disk_that_was_removed_meanwhile_is_noticed(machine: Survivor, tmp_path: Path) -> None:
    machine.attach(make_raw(tmp_path / "gone"), "--bus=virtio-scsi")
    machine.attach(make_raw(tmp_path / "kept"), "--bus=virtio-scsi")
    machine.kill_manager()
    with machine.monitor() as monitor:
        devices = monitor.execute("qom-list", path="/machine/peripheral")["return"]
        ours = sorted(each["name"] for each in devices if each["name"].startswith("drive"))
        assert monitor.execute("device_del", id=ours[1]) == {"return": {}}
    machine.adopt()
    assert "gone was removed meanwhile" in machine.manager.output["stderr"]
    # The manager removes the disk without a request, and the disk's name and image are free again.
    wait_until(lambda: {disk["name"] for disk in machine.disks()} == {"boot", "kept"}, "the removal of the disk gone")
    machine.attach(tmp_path / "gone", "--bus=virtio-scsi")
    assert {disk["name"] for disk in machine.disks()} == {"boot", "kept", "gone"}


def test_an_adoption_reports_that_qemu_has_ended(machine: Survivor) -> None:
    machine.kill_manager()
    machine.kill_qemu()
    done = vmspawn("--adopt", "-M", machine.name)
    assert done.returncode == 1
    assert f"machine {machine.name} has ended while it had no manager; its files were removed" in done.stderr
    assert is_gone(machine.name)


def test_the_end_of_an_adopted_qemu_is_reported(machine: Survivor) -> None:
    machine.kill_manager()
    machine.adopt()
    machine.kill_qemu()
    assert machine.manager.wait() == 1
    assert "QEMU ended without reporting a reason" in machine.manager.output["stderr"]
    assert is_gone(machine.name)


def test_an_adopted_machine_ends_as_any_other(machine: Survivor) -> None:
    machine.kill_manager()
    machine.adopt()
    machine.manager.signal(signal.SIGTERM)
    machine.manager.wait_for("asked the guest to power off")
    machine.manager.signal(signal.SIGTERM)
    assert machine.manager.wait() == 0
    assert "the machine was terminated" in machine.manager.output["stderr"]
    assert is_gone(machine.name)
    assert process_is_gone(machine.pid)


def test_an_adoption_empties_a_full_log_of_the_console(qemu: str, tmp_path: Path) -> None:
    """The guest is firmware, which prints the same at each reset."""
    image = make_raw(tmp_path / "boot", 1 << 20)
    options = (f"--qemu={qemu}", f"--image={image}", "--ram=64M", "--console=headless", *SERIAL_BIOS)
    with survivor(fresh_name(), *options) as machine:
        machine.kill_manager()
        log = ConsoleLog.of(machine.pid)
        assert log is not None
        # The test makes the log look as if the guest had printed all but ten bytes of the limit.
        os.ftruncate(log.fd, os.fstat(log.fd).st_size - log.size + KEPT_MAX - 10)
        reset_until(machine, lambda: log.is_full, "a full log")
        shown = tmp_path / "first"
        machine.adopt(f"--log={shown}")
        # The output of the time without a manager: zeroes, and a mark where output is missing.
        assert bytes(KEPT_MAX // 2) in shown.read_bytes()
        assert MISSING in shown.read_bytes()
        machine.kill_manager()
        reset_until(machine, lambda: NOTHING_TO_BOOT.encode() in log.read(log.size), "the firmware's output")
        log.close()
        shown = tmp_path / "second"
        machine.adopt(f"--log={shown}")
        assert NOTHING_TO_BOOT.encode() in shown.read_bytes()
        assert MISSING not in shown.read_bytes()


def reset_until(machine: Survivor, condition: Callable[[], bool], what: str) -> None:
    """Reset a machine without a manager, and wait until a condition holds. `what` names it in the error."""
    with machine.monitor() as monitor:
        assert monitor.execute("system_reset") == {"return": {}}
        wait_until(condition, what)


def test_a_monitor_in_use_is_reported(machine: Survivor) -> None:
    machine.kill_manager()
    with machine.monitor():
        done = vmspawn("--adopt", "-M", machine.name)
    assert done.returncode == 1
    assert "gave no greeting" in done.stderr
    assert "another program may be connected to it" in done.stderr
    assert "adopted" not in done.stderr
    assert not process_is_gone(machine.pid)
    machine.adopt()


def test_the_descriptors_of_former_sessions_are_closed(machine: Survivor, tmp_path: Path) -> None:
    """The remains are a name of getfd, which QEMU cannot list, and a descriptor set that nothing uses."""
    session = acquire(machine)
    with open(make_raw(tmp_path / "passed", 4096), "rb") as file:
        assert session.run("getfd", fds=[file.fileno()], fdname="left") == {"return": {}}
        assert session.run("add-fd", fds=[file.fileno()])["return"]["fdset-id"] == 0
    machine.kill_manager()
    session.close()
    machine.adopt()
    machine.kill_manager()
    # Names belong to the sessions' monitor.
    with RawMonitor(os.path.join(machine.folder, "qmp-sessions")) as monitor:
        assert monitor.execute("closefd", fdname="left")["error"]["desc"].endswith("'left' not found")
        assert not [fdset for fdset in monitor.execute("query-fdsets")["return"] if fdset["fds"]]
    machine.adopt()


def acquire(machine: Survivor) -> Client:
    """Return a client of a QMP session on the control socket, by Varlink's upgrade."""
    connected = socket.socket(socket.AF_UNIX)
    connected.settimeout(DEADLINE)
    connected.connect(os.path.join(machine.folder, runtime.CONTROL))
    connected.sendall(b'{"method":"io.systemd.QemuMachineInstance.AcquireQMP","upgrade":true}\0')
    while (byte := connected.recv(1)) != b"\0":
        assert byte, "the connection ended before the reply"
    return Client(connected).negotiate()


def test_adopt_or_start_starts_a_machine_and_adopts_it_later(qemu: str, tmp_path: Path) -> None:
    name = fresh_name()
    image = make_raw(tmp_path / "boot", 1 << 20)
    arguments = (f"--qemu={qemu}", f"--image={image}", "--ram=64M", "--console=headless", "--adopt-or-start")
    with survivor(name, *arguments) as machine:
        machine.kill_manager()
        machine.manager = Spawned(name, arguments)
        machine.manager.wait_for("is running")
        assert f"adopted machine {name} (QEMU is process {machine.pid})" in machine.manager.output["stderr"]
        assert vmctl("terminate", name).returncode == 0
        assert machine.manager.wait() == 0

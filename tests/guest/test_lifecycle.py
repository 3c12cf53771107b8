# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the signals and the verbs of vmctl that end a booted guest."""

import signal
from pathlib import Path

import pytest

from tests.commands import Spawned, qemu_pid, spawned, vmctl
from tests.machines import is_gone, process_is_gone
from tests.terminal import PROMPT, seated

READY = "vmspawn-guest: ready"


def boot(running: Spawned) -> None:
    running.wait_for(READY, stream="stdout")


@pytest.mark.parametrize("machine_type", ["q35", "pc"])
def test_sigterm_is_the_power_button(qemu: str, machine_type: str) -> None:
    with spawned(f"--qemu={qemu}", "--guest=builtin", f"--machine-type={machine_type}") as running:
        boot(running)
        pid = qemu_pid(running.name)
        running.signal(signal.SIGTERM)
        assert running.wait() == 0
    assert "power button pressed, powering off" in running.output["stdout"]
    assert "vmspawn: the guest powered off" in running.output["stderr"]
    assert is_gone(running.name)
    assert process_is_gone(pid)


def test_sigterm_in_firmware_reaches_the_guest_once_it_listens(qemu: str) -> None:
    with spawned(f"--qemu={qemu}", "--guest=builtin") as running:
        running.wait_for("is running")
        running.signal(signal.SIGTERM)
        assert running.wait() == 0
    assert "vmspawn: the guest powered off" in running.output["stderr"]


def test_poweroff_that_waits_presses_the_button_until_the_guest_listens(qemu: str) -> None:
    """The guest is still in its firmware, and misses the first press."""
    with spawned(f"--qemu={qemu}", "--guest=builtin") as running:
        running.wait_for("is running")
        done = vmctl("poweroff", running.name, "--wait")
        assert (done.returncode, done.stderr.count("the power button was pressed")) == (0, 1)
        assert running.wait() == 0


def test_a_tray_that_stays_locked_is_reported_in_time_and_stays_shut(qemu: str, tmp_path: Path) -> None:
    medium = tmp_path / "medium"
    medium.write_bytes(b"the medium".ljust(4096, b"\n"))
    with seated(f"--qemu={qemu}", "--guest=builtin", "--warm") as machine:
        machine.expect(READY.encode())
        machine.expect(PROMPT)
        arguments = (str(medium), "--bus=scsi-cd", "--name=cd")
        assert vmctl("attach-disk", machine.name, *arguments).returncode == 0
        machine.run("until [ -b /dev/sr0 ]; do usleep 20000; done; exec 3</dev/sr0")
        done = vmctl("eject-media", machine.name, "cd", "--timeout=0.5")
        assert done.returncode == 1
        assert "the guest has locked the tray of cd and has not opened it within 0.5 s" in done.stderr
        assert "use --force" in done.stderr
        # No operation continues in the background: the next change fails as well, and the medium stays inserted.
        again = vmctl("insert-media", machine.name, "cd", str(medium), "--timeout=0")
        assert again.returncode == 1
        assert b"the medium" in machine.run("exec 3<&-; head -n 1 /dev/sr0")
        assert vmctl("terminate", machine.name).returncode == 0


#: Replaces the listener for the power button by a slow one, like a guest that stops its services first.
SLOW_BUTTON = (
    "killall dd; button=$(grep -l 'Power Button' /sys/class/input/event*/device/name | cut -d/ -f5)",
    "exec 3</dev/input/$button",
    "pressed() { dd of=/dev/null bs=4096 count=1 2>/dev/null <&3; echo stop''ping; }",
    "(pressed; until [ -e /tmp/go ]; do usleep 20000; done; poweroff -f) &",
)


@pytest.mark.parametrize("insist", [False, True], ids=["once", "twice"])
def test_sigterm_during_a_shutdown_waits_and_a_second_one_ends_the_machine(qemu: str, *, insist: bool) -> None:
    """One signal waits for the shutdown that has begun; two end the machine."""
    with seated(f"--qemu={qemu}", "--guest=builtin", "--warm") as machine:
        machine.expect(READY.encode())
        machine.expect(PROMPT)
        for line in SLOW_BUTTON:
            machine.type(line.encode() + b"\n")
            machine.expect(PROMPT)
        assert vmctl("poweroff", machine.name).returncode == 0
        machine.expect(rb"stopping\r\n")
        machine.signal(signal.SIGTERM)
        machine.expect(rb"SIGTERM: asked the guest to power off")
        if insist:
            machine.signal(signal.SIGTERM)
        else:
            machine.run(": >/tmp/go")
        assert machine.ended() == 0
        assert (b"the machine was terminated" if insist else b"the guest powered off") in machine.shown


def test_vmctl_reboots_and_powers_off_a_guest_with_kernel_arguments(qemu: str) -> None:
    arguments = ("--cpus=2", "vmspawn.test=here", "loglevel=7")
    with spawned("--ram=128M", f"--qemu={qemu}", "--guest=builtin", *arguments) as running:
        boot(running)
        assert "vmspawn.test=here" in running.output["stdout"]
        assert "2 CPUs" in running.output["stdout"]
        running.output["stdout"] = ""
        assert vmctl("reboot", running.name).returncode == 0
        boot(running)
        assert vmctl("poweroff", running.name).returncode == 0
        assert running.wait() == 0
    assert "vmspawn: the guest powered off" in running.output["stderr"]

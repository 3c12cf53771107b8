# SPDX-License-Identifier: LGPL-2.1-or-later
"""A booted guest and its end: what the signals and vmctl's verbs do to it."""

import signal

import pytest

from tests.commands import Spawned, qemu_pid, spawned, vmctl
from tests.machines import is_gone, process_is_gone

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


def test_poweroff_and_reboot_by_vmctl(qemu: str) -> None:
    with spawned(f"--qemu={qemu}", "--guest=builtin") as running:
        boot(running)
        running.output["stdout"] = ""
        assert vmctl("reboot", running.name).returncode == 0
        boot(running)
        assert vmctl("poweroff", running.name).returncode == 0
        assert running.wait() == 0
    assert "vmspawn: the guest powered off" in running.output["stderr"]


def test_kernel_arguments_reach_the_guest(qemu: str) -> None:
    with spawned(
        "--ram=128M", f"--qemu={qemu}", "--guest=builtin", "--cpus=2", "vmspawn.test=here", "loglevel=7"
    ) as running:
        boot(running)
        vmctl("terminate", running.name)
        running.wait()
    assert "vmspawn.test=here" in running.output["stdout"]
    assert "2 CPUs" in running.output["stdout"]

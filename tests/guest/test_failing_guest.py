# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the reports of failing guests: a kernel that panics, and one that reboots in a loop."""

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.commands import DEADLINE, one_line, qemu_pid, spawned, vmctl
from tests.machines import Machine, fresh_name
from vmspawn.errors import NotConnected
from vmspawn.guest.build import build
from vmspawn.manager.shutdown import FAILED_GUEST_TIMEOUT

PANIC = "the guest's kernel panicked: VFS: Unable to mount root fs"


@pytest.fixture
def kernel(qemu: str) -> tuple[str, ...]:
    """Return the options for a kernel without a root file system, and so without the module that drives pvpanic."""
    guest = build()
    return (f"--qemu={qemu}", f"--linux={guest.kernel}", "--ram=256M", "--console=headless")


def test_a_printed_panic_is_reported_and_the_exit_status_is_1(kernel: tuple[str, ...]) -> None:
    with spawned(*kernel, "panic=0") as machine:
        machine.wait_for(PANIC)
        status = json.loads(vmctl("status", machine.name, "--json=short").stdout)
        assert PANIC in status["lastError"]["text"]
        machine.signal(signal.SIGTERM)
        machine.wait_for(f"else it ends after {FAILED_GUEST_TIMEOUT:g} s")
        assert vmctl("terminate", machine.name, "--wait").returncode == 0
        assert machine.wait() == 1


def test_a_panic_ends_a_machine_that_does_not_reboot_with_status_1(kernel: tuple[str, ...]) -> None:
    with spawned(*kernel, "--qemu-arg=-no-reboot", "panic=-1") as machine:
        assert machine.wait() == 1
    assert PANIC in machine.output["stderr"]


def test_a_loop_of_panics_and_reboots_is_reported(kernel: tuple[str, ...]) -> None:
    with spawned(*kernel, "panic=-1") as machine:
        machine.wait_for(f"the guest has reset itself 3 times in a row and may never come up; {PANIC}")
        assert machine.terminate()
        assert machine.wait() == 1


async def test_a_panic_ends_the_commands_in_the_guest(qemu: str) -> None:
    settings: dict[str, Any] = {"guest": "builtin", "qemu": qemu, "console": "headless", "control": True}
    async with Machine(name=fresh_name(), **settings) as machine:
        client = asyncio.create_task(asyncio.to_thread(vmctl, "exec", machine.name, "sleep", "1000"))
        await machine.run("until ps -o args | grep -q '^sleep 1000'; do usleep 10000; done", timeout=DEADLINE)
        with pytest.raises(NotConnected, match="the command was ended: the guest's kernel panicked"):
            await machine.run("echo c >/proc/sysrq-trigger; sleep 1000")
        done = await client
    assert done.returncode == 125
    assert "the command was ended: the guest's kernel panicked" in one_line(done, "vmctl")


def test_a_users_kernel_gets_the_argument_that_emulation_needs(kernel: tuple[str, ...]) -> None:
    """The argument precedes the user's own arguments on QEMU's command line, and -v reports it."""
    with spawned(*kernel, "-v", "--kvm=no", "--qemu-arg=-S", "quiet") as machine:
        machine.wait_for("is running")
        command = Path(f"/proc/{qemu_pid(machine.name)}/cmdline").read_text().split("\0")
        assert command[command.index("-append") + 1].split()[-2:] == ["no_timer_check", "quiet"]
        (line,) = (line for line in machine.output["stderr"].splitlines() if "no_timer_check" in line)
        assert line.startswith("vmspawn: ")

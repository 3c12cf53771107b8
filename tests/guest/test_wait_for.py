# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests `vmctl wait` and `machine.wait_for` with the built-in guest."""

from __future__ import annotations

import asyncio
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmspawn
from tests.commands import DEADLINE, VMCTL, Spawned, background, one_line, run_example, spawned, vmctl
from tests.conftest import make_raw
from tests.machines import fresh_name
from vmspawn.errors import MachineEnded, NoSuchStorage, Timeout

READY = "vmspawn-guest: ready"


@pytest.fixture(scope="module")
def machine(qemu: str) -> Iterator[Spawned]:
    """Start one machine for all tests that do not end it."""
    with spawned("--guest=builtin", f"--qemu={qemu}", "--console=headless", "--forward=0:22") as running:
        yield running


def wait(machine: str, *conditions: str, timeout: float = DEADLINE) -> subprocess.CompletedProcess[str]:
    return vmctl(
        "wait", machine, *(f"--for={each}" for each in conditions), f"--timeout={timeout:g}", timeout=2 * DEADLINE
    )


def guest(machine: Spawned, command: str) -> None:
    done = vmctl("exec", machine.name, "sh", "-c", command)
    assert done.returncode == 0, done.stderr


def test_a_machine_that_is_about_to_start_is_waited_for(machine: Spawned) -> None:
    """This is the first test: vmspawn has just been started."""
    # With (?m), `$` also matches before a prompt that follows the line.
    done = wait(machine.name, "agent", "booted", f"console=(?m){READY}$")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_port_is_waited_for_until_a_program_listens_on_it(machine: Spawned) -> None:
    late = wait(machine.name, "port=8000", "agent", timeout=1)
    assert late.returncode == 1
    line = f"vmctl: machine {machine.name}: timed out waiting for port=8000 (nothing listens on it in the guest)"
    assert one_line(late, "vmctl") == line
    with background([*VMCTL, "wait", machine.name, "--for=port=8000"]) as process:
        guest(machine, "httpd -p 127.0.0.1:8001; httpd -p 8000")
        assert process.wait(DEADLINE) == 0
    assert wait(machine.name, "port=8000", "port=8001").returncode == 0


def test_a_disk_is_waited_for_and_a_missing_disk_is_an_error(machine: Spawned, tmp_path: Path) -> None:
    assert vmctl("attach-disk", machine.name, str(make_raw(tmp_path / "disk"))).returncode == 0
    assert wait(machine.name, "disk=disk").returncode == 0
    assert "no disk" in one_line(wait(machine.name, "disk=none"), "vmctl")
    assert vmctl("detach-disk", machine.name, "disk").returncode == 0


def test_an_ssh_server_is_asked_through_the_forward(machine: Spawned) -> None:
    """Another server on the port is not sufficient."""
    guest(machine, "nc -ll -p 22 -e echo HTTP >/dev/null 2>&1 </dev/null &")
    late = wait(machine.name, "ssh", timeout=1)
    assert re.search(r"timed out waiting for ssh \(no SSH server answers on 127.0.0.1:\d+\)", late.stderr)
    # The port is free after the first server has ended.
    guest(machine, "killall nc; while pidof nc >/dev/null; do :; done")
    guest(machine, "nc -ll -p 22 -e echo SSH-2.0-test >/dev/null 2>&1 </dev/null &")
    assert wait(machine.name, "ssh").returncode == 0


def test_a_timeout_reports_the_last_line_of_the_console(machine: Spawned) -> None:
    late = wait(machine.name, "console=never", "off", timeout=2)
    assert late.returncode == 1
    assert "console=never (the last line is: " in late.stderr
    assert "off (it still runs)" in late.stderr


async def test_the_library_waits_for_conditions(machine: Spawned) -> None:
    async with vmspawn.connect(machine.name) as connected:
        await connected.wait_for("booted", f"console={READY}", timeout=DEADLINE)
        with pytest.raises(NoSuchStorage):
            await connected.wait_for("disk=none")
        with pytest.raises(Timeout, match=r"port=9 \("):
            await connected.wait_for("agent", "port=9", timeout=0.5)


def test_the_example_of_the_docs_works(machine: Spawned, tmp_path: Path) -> None:
    done = run_example("wait.md", "wait", tmp_path, {"demo": machine.name, "8000": "8003"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


async def test_a_guest_that_reboots_is_asked_again_and_one_that_ends_is_not(qemu: str) -> None:
    name = fresh_name()
    async with vmspawn.Machine(guest="builtin", warm=True, qemu=qemu, name=name) as machine:
        await machine.wait_for("booted", timeout=DEADLINE)
        waiting = asyncio.create_task(machine.wait_for("port=80", timeout=2 * DEADLINE))
        mark = machine.events.mark
        await machine.run("reboot -f &")
        await machine.events.wait("RESET", since=mark, timeout=DEADLINE)
        await machine.run("httpd -p 80")
        await waiting
        late = asyncio.create_task(machine.wait_for("port=81", "console=never", timeout=DEADLINE))
        off = asyncio.create_task(machine.wait_for("off", timeout=DEADLINE))
        await asyncio.sleep(0)
        await machine.terminate()
        await off
        with pytest.raises(MachineEnded, match=r"terminated before (port=81|console=never)"):
            await late
    assert wait(name, "off", "off").returncode == 0


def test_invalid_conditions_and_missing_machines_are_refused() -> None:
    start = time.monotonic()
    for arguments, why in (((), "nothing to wait for"), (("--for=ready",), "no condition ready")):
        done = vmctl("wait", "nobody", *arguments)
        assert done.returncode == 2
        assert why in one_line(done, "vmctl")
    done = wait("nobody", "agent", timeout=0.3)
    assert (done.returncode, one_line(done, "vmctl")) == (1, "vmctl: there is no machine named nobody")
    assert time.monotonic() - start < DEADLINE

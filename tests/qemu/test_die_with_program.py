# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that a machine with `die_with_program` leaves nothing behind, however the program dies."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import DEADLINE, VMSPAWN, vmctl
from tests.conftest import make_raw
from tests.machines import fresh_name, is_gone, processes_of, wait_until_nothing_left
from tests.qemu.qmp_fixtures import wait_until
from tests.survivors import wait_until_dead

PROGRAM = """
import asyncio, os, signal, sys, threading
from vmspawn import Machine
from vmspawn.host.runtime import MachineDirectory

def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[4] == "before the directory":
    MachineDirectory.create = killed
elif sys.argv[4] == "after the directory":
    MachineDirectory.listen = killed

async def run(name, qemu, image, how):
    options = dict(name=name, qemu=qemu, image=image, ram=64 << 20, console="headless", ephemeral=True)
    async with Machine(**options, die_with_program=True) as machine:
        if how == "fork" and os.fork() == 0:
            signal.pause()
        print("up", machine.pid, flush=True)
        if how == "os._exit":
            os._exit(3)
        if how == "sys.exit":
            sys.exit(3)
        await machine.wait()

def main():
    asyncio.run(run(*sys.argv[1:]))

if sys.argv[4] == "thread":
    thread = threading.Thread(target=main, daemon=True)
    thread.start()
    thread.join()
else:
    main()
"""


@pytest.fixture
def start(qemu: str, tmp_path: Path) -> Callable[[str, str], subprocess.Popen[str]]:
    image = make_raw(tmp_path / "boot", 1 << 20)

    def run(name: str, how: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROGRAM, name, qemu, str(image), how]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)

    return run


Start = Callable[[str, str], subprocess.Popen[str]]


@pytest.mark.parametrize("how", ["SIGKILL", "thread", "os._exit", "sys.exit", "stopped", "fork"])
def test_nothing_is_left_of_a_machine_whose_program_dies(start: Start, how: str) -> None:
    name = fresh_name()
    with start(name, how) as program:
        assert program.stdout is not None
        assert "up" in program.stdout.readline()
        assert processes_of(name) or how in ("os._exit", "sys.exit")
        if how == "stopped":
            program.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, program.pid, os.WSTOPPED)
            assert len(processes_of(name)) == 2
        if how in ("SIGKILL", "thread", "stopped"):
            os.killpg(program.pid, signal.SIGKILL)
        elif how == "fork":
            program.kill()
        program.wait(timeout=DEADLINE)
        try:
            wait_until_nothing_left(name)
        finally:
            if how == "fork":
                os.killpg(program.pid, signal.SIGKILL)


@pytest.mark.parametrize("moment", [0.05, 0.15, 0.25, 0.35, 0.45, 0.6])
def test_nothing_is_left_if_a_program_dies_while_its_machine_starts(start: Start, moment: float) -> None:
    name = fresh_name()
    with start(name, "SIGKILL") as program:
        time.sleep(moment)
        program.kill()
        program.wait(timeout=DEADLINE)
        wait_until_nothing_left(name)


@pytest.mark.parametrize("how", ["before the directory", "after the directory"])
def test_nothing_is_left_if_a_program_dies_before_or_after_it_makes_the_directory(start: Start, how: str) -> None:
    """Before, there is no directory, and only the watcher must end."""
    name = fresh_name()
    with start(name, how) as program:
        assert program.wait(timeout=DEADLINE) == -signal.SIGKILL
        wait_until_nothing_left(name)


def test_a_killed_program_leaves_an_older_machine_of_the_name_alone(start: Start, qemu: str, tmp_path: Path) -> None:
    name = fresh_name()
    image = make_raw(tmp_path / "older", 1 << 20)
    command = [*VMSPAWN, f"--qemu={qemu}", f"--image={image}", "--ram=64M", "--console=headless", "-M", name]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as manager:
        assert manager.stderr is not None
        assert any("is running" in line for line in manager.stderr)
        manager.kill()
    try:
        (older,) = processes_of(name)
        with start(name, "before the directory") as program:
            assert program.wait(timeout=DEADLINE) == -signal.SIGKILL
        wait_until(lambda: processes_of(name) == [older], "the end of the watcher")
        assert not is_gone(name)
    finally:
        vmctl("adopt", name)
        vmctl("terminate", name)


@pytest.mark.parametrize("victim", ["parent", "manager"])
def test_vmspawn_dies_with_its_parent(qemu: str, tmp_path: Path, victim: str) -> None:
    name = fresh_name()
    image = make_raw(tmp_path / "boot", 1 << 20)
    options = [f"--qemu={qemu}", f"--image={image}", "--ram=64M", "--console=headless", "-M", name]
    script = (
        "import subprocess, sys; child = subprocess.Popen(sys.argv[1:]); print(child.pid, flush=True); child.wait()"
    )
    command = [sys.executable, "-c", script, *VMSPAWN, "--die-with-parent", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stderr is not None
        manager = int(parent.stdout.readline())
        for line in parent.stderr:
            if "is running" in line:
                break
        assert len(processes_of(name)) >= 2
        if victim == "parent":
            parent.kill()
        else:
            os.kill(manager, signal.SIGKILL)
        wait_until_nothing_left(name)
        wait_until_dead(manager)

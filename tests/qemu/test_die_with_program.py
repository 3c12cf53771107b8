# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that a machine with `die_with_program` leaves nothing behind, however the program dies."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import DEADLINE, VMSPAWN, make_script, spawned, vmctl
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
        if how == "leave":
            await machine._running.leave()
            machine._stop_serving()
        print("up", machine.pid, flush=True)
        if how == "leave":
            signal.pause()
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
def test_vmspawn_dies_with_its_parent(qemu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str) -> None:
    """The watcher kills QEMU while the manager lives. The manager reports the reason, and not a fault of QEMU."""
    monkeypatch.setenv("VMSPAWN_CACHE_DIR", str(tmp_path / "cache"))
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
        if victim == "parent":
            assert parent.stderr.read() == "vmspawn: the machine was ended: the process that started vmspawn ended\n"
        assert not (tmp_path / "cache" / "reports").exists()


def test_a_start_fails_with_the_reason_if_the_parent_ends(qemu: str, tmp_path: Path) -> None:
    """The process that becomes QEMU kills the parent, and stops, so that the watcher kills it before it is QEMU."""
    name = fresh_name()
    image, pid = make_raw(tmp_path / "boot", 1 << 20), tmp_path / "parent"
    stops = f'case "$*" in *"-name {name},"*) kill -KILL "$(cat {pid})"; kill -STOP $$;; esac'
    script = make_script(tmp_path / "qemu", f'{stops}\nexec {shutil.which(qemu)} "$@"')
    options = [f"--qemu={script}", f"--image={image}", "--ram=64M", "--console=headless", "-M", name]
    command = ["sh", "-c", 'echo $$ > "$0"; "$@"; true', str(pid), *VMSPAWN, "--die-with-parent", *options]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=DEADLINE, check=False)
    assert done.stderr.splitlines()[-1] == "vmspawn: the machine was ended: the process that started vmspawn ended"
    wait_until_nothing_left(name)


def test_another_manager_reports_that_the_program_ended(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMSPAWN_CACHE_DIR", str(tmp_path / "cache"))
    name = fresh_name()
    with start(name, "leave") as program:
        assert program.stdout is not None
        assert "up" in program.stdout.readline()
        with spawned("--adopt", "--console=headless", name=name) as manager:
            manager.wait_for("is running")
            program.kill()
            program.wait(timeout=DEADLINE)
            assert manager.wait() == 0
            last = manager.output["stderr"].splitlines()[-1]
            assert last == "vmspawn: the machine was ended: the program that started the machine ended"
        wait_until_nothing_left(name)
    assert not (tmp_path / "cache" / "reports").exists()

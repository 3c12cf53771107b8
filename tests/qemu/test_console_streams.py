# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the console on streams that are not a terminal, closed or full, and on terminals that disappear."""

import os
import select
import subprocess
from pathlib import Path

import pytest

from tests.bootsector import make_echoing_boot_sector
from tests.commands import (
    DEADLINE,
    NOTHING_TO_BOOT,
    SERIAL_BIOS,
    VMSPAWN,
    Spawned,
    background,
    qemu_pid,
    spawned,
    vmctl,
)
from tests.conftest import make_raw
from tests.machines import Machine, fresh_name, is_gone, links_of, process_is_gone
from tests.qemu.qmp_fixtures import wait_until
from tests.terminal import seated, shell_job, terminal

# Terminals that disappear.


def test_a_terminal_that_goes_away_is_like_sighup(options: tuple[str, ...]) -> None:
    """The terminal's settings disappear with it."""
    with seated(*options, "--shutdown-timeout=0.2") as machine:
        machine.expect(rb"is running")
        machine.wait_until_raw()
        pid = qemu_pid(machine.name)
        os.close(machine.slave)
        os.close(machine.master)
        assert machine.process.wait(timeout=DEADLINE) == 0
        assert process_is_gone(pid)
        assert is_gone(machine.name)


def test_the_settings_of_a_terminal_that_hangs_up_are_restored(options: tuple[str, ...]) -> None:
    """The death of a session's leader hangs up its terminal; getty, for example, then opens the terminal again."""
    with terminal() as tty:
        shell = tty.start(["bash", "--norc", "--noediting", "-i"], PS1="$ ")
        tty.type(" ".join([*VMSPAWN, "-M", "orphan", *options, "--shutdown-timeout=0.2", "\n"]).encode())
        tty.expect(rb"is running")
        tty.wait_until_raw()
        manager = os.pidfd_open(shell_job(shell.pid))
        try:
            shell.kill()
            assert select.select([manager], [], [], DEADLINE)[0]
        finally:
            os.close(manager)
        assert is_gone("orphan")
        assert tty.settings() == tty.settings_before


def test_a_machine_that_ignores_sighup_outlives_its_terminal(options: tuple[str, ...]) -> None:
    with terminal() as tty:
        process = tty.start(["sh", "-c", "trap '' HUP; exec \"$@\"", "sh", *VMSPAWN, "-M", "hardy", *options])
        tty.expect(rb"is running")
        tty.wait_until_raw()
        os.close(tty.slave)
        os.close(tty.master)
        assert vmctl("status", "hardy").returncode == 0
        assert vmctl("terminate", "hardy", "--wait").returncode == 0
        assert process.wait(timeout=DEADLINE) == 0


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("console", ["interactive", "read-only"])
def test_a_machine_runs_with_closed_standard_streams(options: tuple[str, ...], closed: str, console: str) -> None:
    name = "closed"
    command = " ".join([*VMSPAWN, "-M", name, *options, f"--console={console}", closed])
    with background(["sh", "-c", f"exec {command}"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        wait_until(lambda: vmctl("status", name).returncode == 0, "an answer to vmctl", run)
        assert vmctl("poweroff", name).returncode == 0
        assert vmctl("terminate", name, "--wait").returncode == 0
        assert run.wait(timeout=DEADLINE) == 0
    assert is_gone(name)


def test_standard_input_and_output_may_be_files(options: tuple[str, ...], tmp_path: Path) -> None:
    """The guest gets all bytes of the input, which it sends back."""
    typed = bytes(range(256))
    (tmp_path / "in").write_bytes(typed)
    image, log = make_echoing_boot_sector(tmp_path / "boot"), tmp_path / "log"
    with open(tmp_path / "in", "rb") as source, open(tmp_path / "out", "wb") as target:
        target.write(b"before\n")
        target.flush()
        command = [*VMSPAWN, "-M", "filed", *options, f"--image={image}", "--console=interactive", f"--log={log}"]
        with background(command, stdin=source, stdout=target, stderr=subprocess.PIPE) as run:
            wait_until(lambda: typed in (tmp_path / "out").read_bytes(), "the echo of the input", run)
            assert vmctl("terminate", "filed", "--wait").returncode == 0
            run.communicate(timeout=DEADLINE)
            assert run.returncode == 0
    assert log.read_bytes() == typed
    assert (tmp_path / "out").read_bytes() == b"before\n" + typed


def test_a_reader_that_goes_away_does_not_end_the_machine(options: tuple[str, ...], tmp_path: Path) -> None:
    """The guest's output after that goes only to the log."""
    log = tmp_path / "log"
    with spawned(*options, *SERIAL_BIOS, f"--log={log}") as running:
        running.wait_for(NOTHING_TO_BOOT, stream="stdout")
        running.hang_up("stdout")
        assert vmctl("reboot", running.name).returncode == 0
        wait_until(
            lambda: log.read_bytes().count(NOTHING_TO_BOOT.encode()) == 2,
            "the firmware's output after the reset",
            running.process,
        )
        assert vmctl("status", running.name).returncode == 0


def test_a_background_job_leaves_the_terminal_alone(options: tuple[str, ...]) -> None:
    """A background job shows the console, and reads no keys."""
    with terminal() as tty:
        shell = tty.start(["bash", "--norc", "--noediting", "-i"], PS1="$ ")
        tty.type(" ".join([*VMSPAWN, "-M", "behind", *options, *SERIAL_BIOS, "&", "\n"]).encode())
        tty.expect(NOTHING_TO_BOOT.encode())
        assert tty.settings() == tty.settings_before
        tty.type(b"echo stays the she''ll\n")
        tty.expect(rb"stays the shell\r\n")
        assert vmctl("terminate", "behind", "--wait").returncode == 0
        tty.type(b"exit\n")
        assert tty.wait(shell) == 0


# Files that are full.

#: The size limit of files, which the file has already reached. The error is EFBIG; that of a full disk is ENOSPC.
LIMIT = 16 << 20

#: vmspawn with that limit.
LIMITED = ("prlimit", f"--fsize={LIMIT}", "--", *VMSPAWN)


def test_a_transcript_that_cannot_be_written_is_reported_once(options: tuple[str, ...], tmp_path: Path) -> None:
    log = make_raw(tmp_path / "log", LIMIT)
    running = Spawned(fresh_name(), (*options, *SERIAL_BIOS, f"--log={log}", "--quiet"), program=LIMITED)
    try:
        running.wait_for(NOTHING_TO_BOOT, stream="stdout")
        said = f"cannot write {log}: File too large; the machine continues without it"
        assert said in vmctl("status", running.name).stdout
        assert vmctl("terminate", running.name, "--wait").returncode == 0
        assert running.wait() == 0
    finally:
        running.close()
    assert running.output["stderr"] == f"vmspawn: {said}\n"
    assert log.stat().st_size == LIMIT


def test_a_full_output_file_is_reported_once(options: tuple[str, ...], tmp_path: Path) -> None:
    """The console continues: its transcript is complete."""
    full, log = make_raw(tmp_path / "full", LIMIT), tmp_path / "log"
    command = [*LIMITED, "-M", "full", *options, *SERIAL_BIOS, f"--log={log}", "-q"]
    with (
        open(full, "ab") as target,
        background(command, stdin=subprocess.DEVNULL, stdout=target, stderr=subprocess.PIPE, text=True) as run,
    ):
        assert run.stderr is not None
        line = run.stderr.readline()
        assert line == "vmspawn: cannot write to standard output: File too large; the machine continues without it\n"
        wait_until(lambda: NOTHING_TO_BOOT.encode() in log.read_bytes(), "the firmware's output in the log", run)
        assert vmctl("terminate", "full", "--wait").returncode == 0
        assert run.wait(timeout=DEADLINE) == 0
        assert run.stderr.read() == ""
    assert full.stat().st_size == LIMIT


async def test_a_transcript_is_closed_with_its_machine(qemu: str, tmp_path: Path) -> None:
    image, log = make_raw(tmp_path / "image", 1 << 20), tmp_path / "log"
    async with Machine(image=str(image), qemu=qemu, ram=64 << 20, console="headless", console_log=str(log)):
        assert str(log) in links_of(os.getpid())
    assert str(log) not in links_of(os.getpid())

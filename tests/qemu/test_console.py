# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests keys, signals, consoles, notifications and `--wait` with machines whose guest is their firmware."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import (
    DEADLINE,
    NOTHING_TO_BOOT,
    SERIAL_BIOS,
    VMCTL,
    VMSPAWN,
    background,
    qemu_pid,
    spawned,
    vmctl,
    vmspawn,
)
from tests.machines import is_gone, process_is_gone
from tests.terminal import END, POWER_OFF, REBOOT, Seated, seated, shell_job, terminal


@pytest.fixture
def machine(options: tuple[str, ...]) -> Iterator[Seated]:
    """Run a machine on a terminal, which shows its console."""
    with seated(*options) as running:
        running.expect(rb"is running[^\n]*\n")
        yield running


# Keys.


def test_three_escapes_typed_one_by_one_end_the_machine(machine: Seated) -> None:
    machine.wait_until_raw()
    pid = qemu_pid(machine.name)
    for byte in END:
        machine.type(bytes([byte]))
    assert machine.ended() == 0
    assert b"the machine was terminated" in machine.shown
    assert is_gone(machine.name)
    assert process_is_gone(pid)


def test_a_guest_that_does_not_react_can_be_forced_by_the_same_keys(options: tuple[str, ...]) -> None:
    """The guest's processors were never started."""
    with seated(*options, "--qemu-arg=-S") as machine:
        machine.expect(rb"is running")
        machine.wait_until_raw()
        machine.type(REBOOT)
        machine.expect(rb"asked the guest to reboot\r\n")
        machine.type(POWER_OFF)
        machine.expect(rb"the guest is prelaunch: it was not started; typing \^\]\^\]p again ends the machine\r\n")
        machine.expect(rb"has not reacted within 10 s; typing \^\]\^\]r again resets the machine\r\n")
        machine.type(REBOOT)
        machine.expect(rb"resetting the machine\r\n")
        machine.type(POWER_OFF)
        machine.expect(rb"\^\]\^\]p: ending the machine\r\n")
        assert machine.ended() == 0


# Signals.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_asks_the_guest_and_a_second_one_ends_the_machine(machine: Seated, number: signal.Signals) -> None:
    machine.wait_until_raw()
    pid = qemu_pid(machine.name)
    machine.signal(number)
    machine.expect(rb"%b: asked the guest to power off" % number.name.encode())
    machine.signal(number)
    assert machine.ended() == 0
    assert is_gone(machine.name)
    assert process_is_gone(pid)


def test_sigquit_ends_the_machine_at_once(machine: Seated) -> None:
    machine.wait_until_raw()
    machine.signal(signal.SIGQUIT)
    assert machine.ended() == 0
    assert b"SIGQUIT: ending the machine" in machine.shown


def test_signals_that_mean_nothing_do_nothing(machine: Seated) -> None:
    machine.wait_until_raw()
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE, signal.SIGCHLD, signal.SIGWINCH):
        machine.signal(number)
    assert vmctl("status", machine.name).returncode == 0
    machine.type(END)
    assert machine.ended() == 0


def test_a_paused_guest_is_resumed_when_it_is_asked_to_power_off(machine: Seated) -> None:
    machine.wait_until_raw()
    assert vmctl("pause", machine.name).returncode == 0
    machine.signal(signal.SIGTERM)
    machine.expect(rb"it was paused and has been resumed")
    machine.signal(signal.SIGTERM)
    assert machine.ended() == 0


def test_a_guest_that_was_never_started_is_ended_at_once(options: tuple[str, ...]) -> None:
    with seated(*options, "--qemu-arg=-S") as machine:
        machine.expect(rb"is running")
        machine.wait_until_raw()
        machine.signal(signal.SIGTERM)
        assert machine.ended() == 0
        assert b"SIGTERM: the guest cannot power off: it was not started; ending the machine" in machine.shown


def test_the_death_of_qemu_is_reported(machine: Seated) -> None:
    machine.wait_until_raw()
    os.kill(qemu_pid(machine.name), signal.SIGKILL)
    assert machine.ended() == 1
    assert b"vmspawn: QEMU died of SIGKILL\r\n" in machine.shown


def test_qemu_that_does_not_obey_is_killed(machine: Seated) -> None:
    machine.wait_until_raw()
    pid = qemu_pid(machine.name)
    os.kill(pid, signal.SIGSTOP)
    machine.type(END)
    assert machine.ended() == 0
    assert b"QEMU did not obey and was killed" in machine.shown
    assert process_is_gone(pid)


def test_a_signal_that_ends_qemu_is_reported(machine: Seated) -> None:
    machine.wait_until_raw()
    os.kill(qemu_pid(machine.name), signal.SIGTERM)
    assert machine.ended() == 1
    assert b"QEMU was ended by a signal" in machine.shown


def test_a_guest_that_reboots_for_ever_can_be_ended(options: tuple[str, ...]) -> None:
    """SeaBIOS resets the machine when it finds nothing to boot."""
    loop = ("--qemu-arg=-boot", "--qemu-arg=reboot-timeout=1")
    with seated(*options, *loop, *SERIAL_BIOS) as machine:
        for _ in range(3):
            machine.expect(NOTHING_TO_BOOT.encode())
        machine.type(END)
        assert machine.ended() == 0


def test_an_ignored_sigchld_does_not_hide_how_qemu_ended(options: tuple[str, ...]) -> None:
    script = (
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    )
    with terminal() as tty:
        process = tty.start([sys.executable, "-c", script, *VMSPAWN, "-M", "childless", *options])
        tty.expect(rb"is running")
        os.kill(qemu_pid("childless"), signal.SIGKILL)
        assert tty.wait(process) == 1
        assert b"QEMU died of SIGKILL" in tty.shown


def test_vmspawn_stops_and_continues_as_a_job_of_a_shell(options: tuple[str, ...]) -> None:
    with terminal() as tty:
        shell = tty.start(["bash", "--norc", "--noediting", "-i"], PS1="$ ")
        tty.expect(rb"\$ ")
        tty.type(" ".join([*VMSPAWN, "-M", "job", *options, "\n"]).encode())
        tty.expect(rb"is running")
        tty.wait_until_raw()
        os.kill(shell_job(shell.pid), signal.SIGTSTP)
        tty.expect(rb"Stopped")
        assert tty.settings() == tty.settings_before
        tty.type(b"fg\n")
        tty.expect(rb"fg\r\n")
        tty.wait_until_raw()
        tty.type(END)
        tty.expect(rb"the machine was terminated")
        tty.expect(rb"\$ ")
        tty.type(b"exit\n")
        assert tty.wait(shell) == 0


# The terminal itself.


def test_flags_of_shared_descriptors_stay(options: tuple[str, ...]) -> None:
    """O_NONBLOCK would affect the shell, and all other users of the terminal."""
    with seated(*options) as machine:
        before = fcntl.fcntl(machine.slave, fcntl.F_GETFL)
        machine.expect(rb"is running")
        machine.wait_until_raw()
        assert fcntl.fcntl(machine.slave, fcntl.F_GETFL) == before
        machine.type(END)
        machine.ended()


def test_a_start_that_fails_leaves_the_terminal_alone(options: tuple[str, ...]) -> None:
    with seated(*options, "--qemu-arg=-nonsense") as machine:
        assert machine.ended() == 1
        assert b"QEMU could not start: -nonsense: invalid option" in machine.shown


# The other consoles.


def test_native_gives_the_terminal_to_qemu_and_takes_it_back(options: tuple[str, ...]) -> None:
    with seated(*options, "--console=native") as machine:
        machine.expect(rb"is running")
        assert "it was started with --console=native" in vmctl("console", machine.name).stderr
        machine.type(b"\x01c")
        machine.expect(rb"\(qemu\) ")
        machine.type(b"quit\n")
        assert machine.ended() == 0


def test_native_restores_the_terminal_of_a_qemu_that_is_killed(options: tuple[str, ...]) -> None:
    with seated(*options, "--console=native") as machine:
        machine.expect(rb"is running")
        machine.wait_until_raw()
        flags = os.O_NONBLOCK
        os.kill(qemu_pid(machine.name), signal.SIGKILL)
        assert machine.ended() == 1
        assert not fcntl.fcntl(machine.slave, fcntl.F_GETFL) & flags


def test_headless_serves_the_console_all_the_same(options: tuple[str, ...]) -> None:
    with spawned(*options, "--console=headless") as running:
        running.wait_for("is running")
        with terminal() as tty:
            process = tty.start([*VMCTL, "console", running.name])
            tty.expect(rb"\^\]\^\]\^\] detaches")
            tty.type(END)
            assert tty.wait(process) == 0
        assert running.output["stdout"] == ""


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--log=/proc/nonexistent/log"], 1, "cannot use --log=/proc/nonexistent/log: No such file or directory"),
        (["--log=/tmp"], 1, "cannot use --log=/tmp: Is a directory"),
        (["--log=/dev/full"], 1, "cannot use --log=/dev/full: not a regular file"),
        (["--log=x", "--console=native"], 2, "--log= gets no output with --console=native"),
        (["--console=loud"], 2, "invalid choice: 'loud'"),
        (["--console-transport=pigeon"], 2, "invalid choice: 'pigeon'"),
    ],
)
def test_an_impossible_console_or_log_is_reported(
    options: tuple[str, ...], arguments: list[str], status: int, message: str
) -> None:
    done = vmspawn(*options, "-M", "wrong", *arguments)
    assert (done.returncode, "Traceback" in done.stderr) == (status, False)
    assert message in done.stderr


# A service.


@pytest.fixture
def notifications(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Open a service manager's socket."""
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        manager.settimeout(DEADLINE)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        yield manager


def received(manager: socket.socket) -> dict[str, str]:
    """Return the next message."""
    return dict(line.partition("=")[::2] for line in manager.recv(4096).decode().splitlines())


def test_a_service_manager_is_notified(options: tuple[str, ...], notifications: socket.socket) -> None:
    with spawned(*options, "--console=headless", "--shutdown-timeout=6") as running:
        assert received(notifications) == {
            "READY": "1",
            "STATUS": f"Machine {running.name} is running",
            "X_VMSPAWN_LEADER_PID": str(qemu_pid(running.name)),
        }
        running.signal(signal.SIGTERM)
        assert received(notifications) == {"STOPPING": "1", "STATUS": "Waiting for the guest to power off"}
        extensions = [int(received(notifications)["EXTEND_TIMEOUT_USEC"]) for _ in range(2)]
        # The next extension comes with the next press of the button, long before this one runs out.
        assert all(extension > 10_000_000 for extension in extensions)
        assert received(notifications)["STATUS"] == "Ending the machine"
        assert running.wait() == 0
        assert received(notifications) == {"STOPPING": "1", "STATUS": "The machine was terminated"}


def test_a_watchdog_is_notified_while_the_machine_runs(
    options: tuple[str, ...], notifications: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "300000")
    with spawned(*options, "--console=headless") as running:
        assert received(notifications)["READY"] == "1"
        assert [received(notifications) for _ in range(4)] == [{"WATCHDOG": "1"}] * 4
        assert vmctl("terminate", running.name).returncode == 0
        assert running.wait() == 0


def test_a_notification_socket_that_does_not_exist_is_ignored(
    options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/proc/nonexistent/notify")
    with spawned(*options, "--console=headless") as running:
        running.wait_for("is running")
        assert vmctl("terminate", running.name, "--wait").returncode == 0
        assert running.wait() == 0


# Waiting.


def test_wait_returns_at_a_reset_and_at_the_end(options: tuple[str, ...]) -> None:
    with spawned(*options, "--console=headless") as running:
        running.wait_for("is running")
        done = vmctl("reboot", running.name, "--wait")
        assert (done.returncode, done.stderr) == (0, "vmctl: the machine was reset\n")
        done = vmctl("terminate", running.name, "--wait")
        assert done.returncode == 0
        assert done.stderr.endswith("vmctl: the machine was terminated\n")
        # The machine's name is free then.
        assert is_gone(running.name)
        assert running.wait() == 0


def test_wait_times_out_if_the_guest_does_not_power_off(options: tuple[str, ...]) -> None:
    with spawned(*options, "--console=headless") as running:
        running.wait_for("is running")
        done = vmctl("poweroff", running.name, "--wait", "--timeout=0.5")
        assert done.returncode == 1
        assert f"cannot poweroff {running.name}: the guest did not power off within 0.5 s" in done.stderr
        assert f"vmctl terminate {running.name}" in done.stderr


def test_wait_reports_the_death_of_qemu(options: tuple[str, ...]) -> None:
    with spawned(*options, "--console=headless") as running:
        running.wait_for("is running")
        with background([*VMCTL, "poweroff", running.name, "--wait"], stderr=subprocess.PIPE, text=True) as waiting:
            assert waiting.stderr is not None
            assert "the power button was pressed" in waiting.stderr.readline()
            os.kill(qemu_pid(running.name), signal.SIGKILL)
            assert waiting.wait(timeout=DEADLINE) == 1
            assert "QEMU died of SIGKILL" in waiting.stderr.read()

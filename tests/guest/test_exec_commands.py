# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests `vmctl exec`, `vmctl shell` and `vmspawn --run=` as a user runs them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.bootsector import make_panicking_boot_sector
from tests.commands import DEADLINE, VMCTL, VMSPAWN, Spawned, background, one_line, run_example, spawned, vmctl
from tests.machines import fresh_name
from tests.terminal import terminal
from vmspawn.agent.protocol import PORTS
from vmspawn.inside.streams import KEPT

MIB = 1 << 20


@pytest.fixture(scope="module")
def machine(qemu: str) -> Iterator[Spawned]:
    """Boot one machine for all tests that do not change it."""
    with spawned("--guest=builtin", f"--qemu={qemu}", "--console=headless") as running:
        run_at_once(running)
        yield running


def run_at_once(machine: Spawned) -> None:
    """Run a command as soon as there is a machine of this name. The command waits for the start and for the agent."""
    deadline = time.monotonic() + DEADLINE
    done = vmctl("exec", machine.name, "true")
    while any(each in done.stderr for each in ("there is no machine", "does not run")):
        assert time.monotonic() < deadline
        done = vmctl("exec", machine.name, "true")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def execute(machine: Spawned, *arguments: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run `vmctl exec`."""
    command = [*VMCTL, "exec", machine.name, *arguments]
    return subprocess.run(command, input=data, capture_output=True, timeout=DEADLINE, check=False)


def runs(machine: Spawned, command: str) -> bool:
    """Return whether a command runs in the guest."""
    return execute(machine, "sh", "-c", f"ps -o args | grep -q '^{command}'").returncode == 0


def until(machine: Spawned, command: str, *, expected: bool) -> None:
    """Wait until a command runs, or no longer runs, in the guest."""
    deadline = time.monotonic() + DEADLINE
    while runs(machine, command) is not expected:
        assert time.monotonic() < deadline, command


# vmctl exec


def test_the_commands_streams_and_status_are_passed_on(machine: Spawned) -> None:
    done = execute(machine, "sh", "-c", "cat; echo err >&2; exit 7", data=b"in\n")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"in\n", b"err\n")


def test_the_examples_of_the_docs_work(machine: Spawned, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for content, found in (("hello", "hello"), ("bye", "status 1")):
        (tmp_path / "src" / "file").write_text(f"{content}\n")
        done = run_example("exec.md", "exec", tmp_path, {"demo": machine.name})
        release = execute(machine, "uname", "-r").stdout.decode()
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{release}{found}\n", "")
    done = run_example("exec.md", "python", tmp_path, {"demo": machine.name})
    assert (done.returncode, done.stdout, done.stderr) == (0, "lo\n\nb'first\\n'\n", "")


def test_options_end_at_the_command(machine: Spawned) -> None:
    done = execute(machine, "-C", "/tmp", "-E", "A=x y", "printf", "%s\\n", "-n", "--", "-C")
    assert done.stdout == b"-n\n--\n-C\n"
    assert execute(machine, "-e", "A=x y", "-u", "77", "--", "sh", "-c", 'echo "$A"; id -u').stdout == b"x y\n77\n"


def test_arguments_that_are_not_text_arrive_as_they_are(machine: Spawned) -> None:
    given = [b"\xff\xfe", b"", b"a\nb", b"'\"$(id)", b"%", b";"]
    command = [*map(str.encode, VMCTL), b"exec", machine.name.encode(), b"printf", b"%s\\0", *given]
    done = subprocess.run(command, capture_output=True, timeout=DEADLINE, check=True)
    assert done.stdout.split(b"\0")[:-1] == given


def test_four_megabytes_come_back_unchanged(machine: Spawned) -> None:
    data = os.urandom(4 * MIB)
    done = execute(machine, "cat", data=data)
    assert (done.returncode, hashlib.sha256(done.stdout).digest()) == (0, hashlib.sha256(data).digest())


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_gigabyte_comes_back_unchanged(machine: Spawned) -> None:
    """The buffers on the way are much smaller."""
    block = os.urandom(MIB)
    command = [*VMCTL, "exec", machine.name, "cat"]
    sent, received = hashlib.sha256(), hashlib.sha256()
    with background(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        source, target = process.stdin, process.stdout

        def send() -> None:
            for _ in range(1024):
                sent.update(block)
                source.write(block)
            source.close()

        sender = threading.Thread(target=send)
        sender.start()
        while data := target.read(MIB):
            received.update(data)
        sender.join()
        assert process.wait(DEADLINE) == 0
    assert received.digest() == sent.digest()


def test_exec_ends_with_141_when_its_reader_ends(machine: Spawned) -> None:
    script = f"{' '.join(VMCTL)} exec {machine.name} yes | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["/bin/bash", "-c", script], capture_output=True, text=True, timeout=DEADLINE, check=True)
    assert done.stdout == "y\n141\n"


@pytest.mark.parametrize("command", ["echo lost", "yes"])
def test_output_that_cannot_be_written_is_an_error_of_exec(machine: Spawned, command: str) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*VMCTL, "exec", machine.name, "sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
    assert done.returncode == 125
    assert done.stderr == "vmctl: cannot write the command's output: No space left on device\n"


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(("no-such-program",), 127), (("/etc/passwd",), 126), (("sh", "-c", "kill -9 $$"), 137)],
)
def test_exec_ends_with_the_status_that_a_shell_reports(
    machine: Spawned, arguments: tuple[str, ...], status: int
) -> None:
    assert execute(machine, *arguments).returncode == status


def test_the_error_explains_why_a_command_did_not_start(machine: Spawned) -> None:
    assert "no-such-program: No such file" in one_line(vmctl("exec", machine.name, "no-such-program"), "vmctl")
    no_user = vmctl("exec", machine.name, "--uid=mallory", "true")
    assert "the guest has no user mallory" in one_line(no_user, "vmctl")
    assert "/nowhere: No such file" in one_line(vmctl("exec", machine.name, "--chdir=/nowhere", "true"), "vmctl")


def test_a_time_limit_ends_the_command_with_status_124(machine: Spawned) -> None:
    done = vmctl("exec", machine.name, "--time-limit=0.5", "sleep", "55555")
    assert done.returncode == 124
    assert "0.5 s" in one_line(done, "vmctl")
    until(machine, "sleep 55555", expected=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("exec", "no-such-machine", "true"), "there is no machine"),
        (("exec", "no-such-machine"), "required"),
        (("exec", "--bogus", "no-such-machine", "true"), "unknown option"),
        (("exec", "no-such-machine", "-E", "=x", "true"), "name is empty"),
    ],
)
def test_errors_of_exec_itself_are_status_125(arguments: tuple[str, ...], message: str) -> None:
    done = vmctl(*arguments)
    assert done.returncode == 125
    assert message in one_line(done, "vmctl")


def test_status_shows_no_events_of_ports_for_commands(machine: Spawned) -> None:
    """Such events would displace those of the machine itself, because each command opens and closes ports."""
    assert execute(machine, "true").returncode == 0
    for verb in ("pause", "resume"):
        assert vmctl(verb, machine.name).returncode == 0
    events = [each["text"] for each in json.loads(vmctl("status", machine.name, "--json=short").stdout)["recentEvents"]]
    assert not [each for each in events if "stream" in each]
    assert {"STOP", "RESUME"} <= {*events}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_the_client_ends_the_command(machine: Spawned, number: signal.Signals) -> None:
    sleep = f"sleep {70000 + number}"
    script = f"setsid {sleep} & exec {sleep}"
    with background([*VMCTL, "exec", machine.name, "sh", "-c", script], stdin=subprocess.DEVNULL) as process:
        until(machine, sleep, expected=True)
        process.send_signal(number)
        assert process.wait(DEADLINE) in (128 + number, -number)
    until(machine, sleep, expected=False)


# A terminal


def test_a_shell_gets_the_terminals_size_and_keys(machine: Spawned) -> None:
    with terminal() as tty:
        process = tty.start([*VMCTL, "shell", machine.name])
        tty.expect(b"vmspawn# ")
        tty.type(b"stty size; echo $TERM\r")
        tty.expect(b"24 80\r\nxterm-256color")
        tty.resize(30, 100)
        tty.type(b"sleep 0.5; stty size\r")
        tty.expect(b"30 100")
        tty.type(b"sleep 1234\r")
        until(machine, "sleep 1234", expected=True)
        tty.type(b"\x03")
        tty.expect(b"vmspawn# ")
        tty.type(b"exit 9\r")
        assert tty.wait(process) == 9


@pytest.mark.parametrize("data", [b"", b"line\n", b"unfinished line"])
def test_a_terminals_input_ends_and_its_output_arrives(machine: Spawned, data: bytes) -> None:
    script = 'cat >/tmp/typed; seq 1 300; echo "<$(cat /tmp/typed)>"; exit 3'
    done = execute(machine, "-t", "sh", "-c", script, data=data)
    numbers = "".join(f"{number}\r\n" for number in range(1, 301))
    # The terminal echoes the input before.
    assert done.stdout.decode().endswith(f"{numbers}<{data.decode().strip()}>\r\n")
    assert (done.returncode, done.stderr) == (3, b"")


def test_three_escapes_disconnect_the_terminal_and_end_the_command(machine: Spawned) -> None:
    with terminal() as tty:
        process = tty.start([*VMCTL, "exec", "-t", machine.name, "sleep", "88888"])
        until(machine, "sleep 88888", expected=True)
        tty.wait_until_raw()
        tty.type(b"\x1d\x1d\x1d")
        assert tty.wait(process) == 125
    until(machine, "sleep 88888", expected=False)


# The end of the manager and of the machine


@contextmanager
def sleeping(machine: str, seconds: int) -> Iterator[subprocess.Popen[str]]:
    """Run a command until something ends it."""
    command = [*VMCTL, "exec", machine, "sleep", str(seconds)]
    with background(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        yield process


def expect_failure(process: subprocess.Popen[str], message: str) -> None:
    """Wait for the end of `vmctl exec`, which reports the reason."""
    assert process.wait(DEADLINE) == 125
    assert process.stderr is not None
    assert message in process.stderr.read()


def test_a_killed_manager_and_a_terminated_machine_end_the_command(qemu: str) -> None:
    with spawned("--guest=builtin", "--warm", f"--qemu={qemu}", "--console=headless") as running:
        running.wait_for("is running")
        with sleeping(running.name, 99999) as process:
            until(running, "sleep 99999", expected=True)
            running.process.kill()
            expect_failure(process, "vmctl adopt")
        assert vmctl("adopt", running.name).returncode == 0
        try:
            until(running, "sleep 99999", expected=False)
            found = json.loads(vmctl("qmp", running.name, "query-chardev", "--json=short").stdout)
            assert len([each for each in found if each["label"].startswith("stream")]) <= KEPT * len(PORTS)
            with sleeping(running.name, 88888) as process:
                until(running, "sleep 88888", expected=True)
                assert vmctl("terminate", running.name).returncode == 0
                expect_failure(process, "terminated")
        finally:
            vmctl("terminate", running.name)


# vmspawn --run=


def run(qemu: str, command: str, *options: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run `vmspawn --run=`."""
    arguments = [*VMSPAWN, "-M", fresh_name(), "--guest=builtin", f"--qemu={qemu}", f"--run={command}", *options]
    return subprocess.run(arguments, input=data, capture_output=True, timeout=2 * DEADLINE, check=False)


def test_run_passes_on_the_streams_and_the_status_of_its_command(qemu: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    archive = subprocess.run(["tar", "c", "-C", str(tmp_path), "file"], capture_output=True, check=True).stdout
    log = tmp_path / "log"
    done = run(
        qemu,
        "tar x -C /tmp && cat /tmp/file && echo err >&2 && echo seen >/dev/console; exit 3",
        f"--log={log}",
        data=archive,
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, b"content", b"err\n")
    assert "seen" in log.read_text()


@pytest.mark.parametrize(
    ("command", "options", "status", "message"),
    [
        ("echo c >/proc/sysrq-trigger; sleep 1000", ("--warm",), 125, b"panic"),
        pytest.param("poweroff -f; sleep 1000", (), 125, b"powered off", marks=pytest.mark.soak),
        pytest.param("reboot -f; sleep 1000", (), 125, b"reboot", marks=pytest.mark.soak),
        ("sleep 1000", ("--time-limit=2",), 124, b"was ended after 2 s"),
    ],
)
def test_run_reports_the_failure_of_its_machine(
    qemu: str, command: str, options: tuple[str, ...], status: int, message: bytes
) -> None:
    done = run(qemu, command, *options)
    assert done.returncode == status, done
    assert message in done.stderr
    assert b"vmctl" not in done.stderr
    assert b"Traceback" not in done.stderr


def test_run_shows_the_end_of_the_console_without_control_sequences(qemu: str, tmp_path: Path) -> None:
    image = make_panicking_boot_sector(tmp_path / "image", b"\r\nstart \x1b[6n\x1b]0;title\x07\x1b[c\x9b6n\x07end\r\n")
    arguments = ["-M", fresh_name(), f"--image={image}", f"--qemu={qemu}", "--run=true", "--machine-type=q35"]
    devices = ["--qemu-arg=-device", "--qemu-arg=pvpanic"]
    done = subprocess.run([*VMSPAWN, *arguments, *devices], capture_output=True, timeout=DEADLINE, check=False)
    lines = done.stderr.decode().splitlines()
    assert "start \ufffd6n\\x07end" in lines
    assert all(line.isprintable() for line in lines)
    assert done.returncode == 125


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_twenty_machines_one_after_the_other_leave_nothing(qemu: str, tmp_path: Path) -> None:
    folder = os.environ["VMSPAWN_RUNTIME_DIR"]

    def left() -> tuple[list[str], set[str]]:
        """Return the entries of the runtime directory, and the processes that use it."""
        processes = set()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if folder.encode() in path.read_bytes():
                    processes.add(path.parent.name)
        return sorted(os.listdir(folder)), processes

    log = tmp_path / "log"
    before = left()
    for number in range(20):
        done = run(qemu, f"cat; exit {number}", f"--log={log}", data=b"input")
        assert (done.returncode, done.stdout) == (number, b"input")
        assert left() == before

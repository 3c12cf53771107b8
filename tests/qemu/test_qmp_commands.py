# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests `vmctl qmp`, `vmctl list-sessions` and `vmctl qmp-share` as a user runs them."""

import json
import os
import re
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pexpect
import pytest

from tests.commands import DEADLINE, VMCTL, Spawned, idle, make_script, qemu_pid, sharing, vmctl
from tests.qemu.qmp_fixtures import Client, Machine, wait_until
from vmspawn.cli.ctl.replies import MACHINE
from vmspawn.control import client as control


@pytest.fixture(scope="module")
def machine(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spawned]:
    with idle(qemu, tmp_path_factory.mktemp("image")) as running:
        yield running


@pytest.fixture
def machine_to_end(qemu: str, tmp_path: Path) -> Iterator[Spawned]:
    with idle(qemu, tmp_path) as running:
        yield running


def test_one_command_gives_one_reply_as_json(machine: Spawned) -> None:
    done = vmctl("qmp", machine.name, "query-status")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["status"] == "running"
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["path=/machine/peripheral"], ['{"path": "/machine/peripheral"}']])
def test_arguments_are_pairs_or_an_object(machine: Spawned, arguments: list[str]) -> None:
    found = json.loads(vmctl("qmp", machine.name, "qom-list", *arguments).stdout)
    assert "scsi0" in {entry["name"] for entry in found}


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["frob"], 1, "QEMU refused frob: The command frob has not been found"),
        (["qom-list"], 1, "Parameter 'path' is missing"),
        (["qom-list", "path"], 2, "'path' is not an argument"),
        (["qom-list", "{broken"], 2, "the arguments are not JSON"),
        (["stop", "--read-only"], 1, "vmspawn refused stop: this session is read-only"),
        ([], 2, "the QMP shell needs a terminal"),
        (["query-status", "--stdio"], 2, "--stdio takes no command"),
    ],
)
def test_a_failure_is_reported_in_one_line(machine: Spawned, arguments: list[str], status: int, message: str) -> None:
    done = subprocess.run(
        [*VMCTL, "qmp", machine.name, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert (done.returncode, done.stdout) == (status, "")
    assert message in done.stderr.splitlines()[0]


def test_the_raw_stream_ends_when_both_sides_have_ended(machine: Spawned) -> None:
    sent = '{"execute":"qmp_capabilities"}' + "".join(f'{{"execute":"query-name","id":{n}}}' for n in range(50))
    done = subprocess.run(
        [*VMCTL, "qmp", machine.name, "--stdio"],
        input=sent,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    greeting, negotiated, *replies = [json.loads(line) for line in done.stdout.splitlines()]
    assert "QMP" in greeting
    assert negotiated == {"return": {}}
    assert [reply["id"] for reply in replies] == list(range(50))


def test_the_raw_stream_loses_nothing_of_a_large_file(machine: Spawned, tmp_path: Path) -> None:
    """The replies exceed a session's limit for unread output, so the program must send and receive at once."""
    count = 3000
    source = tmp_path / "commands"
    source.write_bytes(b'{"execute":"qmp_capabilities"}' + b'{"execute":"query-commands"}' * count)
    with source.open("rb") as commands:
        done = subprocess.run(
            [*VMCTL, "qmp", machine.name, "--stdio"],
            stdin=commands,
            capture_output=True,
            timeout=DEADLINE,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, b"")
    replies = [line for line in done.stdout.splitlines() if b'"event"' not in line]
    assert len(replies) == count + 2
    assert set(replies[2:]) == {replies[2]}


def test_a_program_may_write_everything_into_the_raw_stream_before_it_reads(machine: Spawned) -> None:
    count = 10_000
    with subprocess.Popen(
        [*VMCTL, "qmp", machine.name, "--stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as session:
        assert session.stdin is not None
        assert session.stdout is not None
        session.stdin.write(b'{"execute":"qmp_capabilities"}' + b'{"execute":"query-version"}' * count)
        session.stdin.close()
        replies = [line for line in session.stdout if b'"event"' not in line]
        assert len(replies) == count + 2
        assert session.wait(DEADLINE) == 0


def test_a_raw_stream_that_ends_before_it_took_all_commands_is_an_error(
    machine_to_end: Spawned, tmp_path: Path
) -> None:
    """QEMU obeys `quit`, and runs no later command."""
    source = tmp_path / "commands"
    source.write_bytes(b'{"execute":"qmp_capabilities"}{"execute":"quit"}' + b'{"execute":"query-version"}' * 300_000)
    with source.open("rb") as commands:
        done = subprocess.run(
            [*VMCTL, "qmp", machine_to_end.name, "--stdio"],
            stdin=commands,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("vmctl: lost the session before it took all commands")
    assert done.stdout.count("return") == 2


@pytest.mark.parametrize("victim", ["QEMU", "manager"])
def test_a_raw_stream_that_is_cut_off_after_its_input_ended_is_an_error(machine_to_end: Spawned, victim: str) -> None:
    qemu = qemu_pid(machine_to_end.name)
    with subprocess.Popen(
        [*VMCTL, "qmp", machine_to_end.name, "--stdio"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as session:
        assert session.stdin is not None
        assert session.stdout is not None
        assert session.stderr is not None
        session.stdin.write('{"execute":"qmp_capabilities"}')
        session.stdin.flush()
        assert "QMP" in session.stdout.readline()
        assert "return" in session.stdout.readline()
        # From now on, QEMU does not answer.
        os.kill(qemu, signal.SIGSTOP)
        session.stdin.write('{"execute":"query-name"} {"execute":"query-status"}')
        session.stdin.close()
        wait_until(lambda: session_of(machine_to_end, session.pid)["queued"] > 0, "the session's first command")
        os.kill(qemu if victim == "QEMU" else machine_to_end.process.pid, signal.SIGKILL)
        assert session.wait(DEADLINE) == 1
        message = session.stderr.read()
    if victim == "QEMU":
        assert message == "vmctl: lost the session before it answered 2 commands\n"
    else:
        assert "the manager of machine" in message
        os.kill(qemu, signal.SIGKILL)


def session_of(machine: Spawned, pid: int) -> dict[str, Any]:
    """Return the manager's record of a client's session."""
    with control.Client(machine.name) as caller:
        found = caller.call(f"{MACHINE}.ListSessions")["sessions"]
    return next(entry for entry in found if entry["processId"] == pid)


def test_sessions_are_listed_with_their_clients(machine: Spawned) -> None:
    with subprocess.Popen(
        [*VMCTL, "qmp", machine.name, "--stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as session:
        assert session.stdout is not None
        assert b"QMP" in session.stdout.readline()
        found = json.loads(vmctl("list-sessions", machine.name, "--json=short").stdout)
        assert [entry["processId"] for entry in found] == [session.pid]
        row = vmctl("list-sessions", machine.name).stdout.splitlines()[1].split()
        assert row[:2] == [str(session.pid), str(os.geteuid())]


def test_the_shell_completes_commands_and_shows_replies_errors_and_events(machine: Spawned, tmp_path: Path) -> None:
    shell = at_the_prompt(machine, tmp_path)
    for word, completed, rest, reply in (
        ("query-nam", "query-name", "", f'"name": "{machine.name}"'),
        ("qom-list pa", "path=", "/machine", '"name": "peripheral"'),
    ):
        shell.send(word)
        # The menu shows the completed word; Tab takes it.
        shell.expect(completed.removeprefix("query-"))
        shell.send(f"\t{rest}\r")
        shell.expect(reply)
        shell.expect(f"{machine.name}>")
    shell.send("stop\r")
    shell.expect("STOP")
    shell.send("cont\r")
    shell.expect("RESUME")
    shell.send("query-nonsense\r")
    shell.expect("CommandNotFound")
    shell.expect(f"{machine.name}>")
    shell.sendeof()
    assert_left(shell)


def test_the_shell_keeps_keys_that_are_pressed_while_it_waits(machine: Spawned, tmp_path: Path) -> None:
    shell = at_the_prompt(machine, tmp_path)
    pid = qemu_pid(machine.name)
    os.kill(pid, signal.SIGSTOP)
    try:
        shell.send("query-name\r")
        # After the end of this line, the prompt reads no more keys.
        shell.expect("query-name.*\n")
        shell.send("query-status\r\x04")
    finally:
        os.kill(pid, signal.SIGCONT)
    shell.expect(f'"name": "{machine.name}"')
    shell.expect('"status": "running"')
    assert_left(shell)


def at_the_prompt(machine: Spawned, history: Path) -> Any:
    """Start the QMP shell on its own terminal, and wait for its prompt."""
    pytest.importorskip("prompt_toolkit")
    environment: Any = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "XDG_STATE_HOME": str(history)}
    shell = pexpect.spawn(
        VMCTL[0],
        [*VMCTL[1:], "qmp", machine.name],
        env=environment,
        encoding="utf-8",
        timeout=DEADLINE,
        dimensions=(40, 120),
    )
    shell.expect("Ctrl-D leaves")
    # The prompt shows that the terminal is set up; earlier input could be lost.
    shell.expect(f"{machine.name}>")
    return shell


def assert_left(shell: Any) -> None:
    shell.expect(pexpect.EOF)
    shell.close()
    assert shell.exitstatus == 0


# Sharing a QEMU that another program started.


def check_served(path: str) -> None:
    """Check that QEMU answers a client at the path."""
    with closing(Client.connect(path)) as client:
        assert client.execute(b'{"execute":"query-status","id":"x"}')["id"] == "x"


def test_a_foreign_socket_is_shared_with_many_clients(qemu: str, tmp_path: Path) -> None:
    listen = str(tmp_path / "shared.sock")
    with Machine(qemu, 1) as foreign, sharing(str(foreign.path(0)), listen) as share:
        assert stat.S_IMODE(os.stat(listen).st_mode) == 0o600
        for _ in range(5):
            check_served(listen)
        share.send_signal(signal.SIGINT)
        assert share.wait(timeout=DEADLINE) == 0
        assert not os.path.exists(listen)
        # QEMU's own socket has not changed, and can be shared again.
        with sharing(str(foreign.path(0)), listen):
            check_served(listen)


def test_sharing_ends_with_qemu_and_reports_it(qemu: str, tmp_path: Path) -> None:
    listen = str(tmp_path / "shared.sock")
    with Machine(qemu, 1) as foreign, sharing(str(foreign.path(0)), listen) as share:
        foreign.kill()
        assert share.wait(timeout=DEADLINE) == 1
        assert share.stderr is not None
        assert share.stderr.read().startswith("vmctl: QEMU closed its monitor")
        assert not os.path.exists(listen)


def test_a_socket_in_use_is_reported(qemu: str, tmp_path: Path) -> None:
    with Machine(qemu, 1) as foreign, foreign.connect(0) as holder:
        assert b"QMP" in holder.recv(4096)
        done = vmctl("qmp-share", str(foreign.path(0)), str(tmp_path / "shared.sock"), "--timeout=1")
        assert done.returncode == 1
        assert "gave no greeting within 1 s" in done.stderr
        assert "close the program that uses this socket" in done.stderr


def test_a_missing_monitor_and_a_path_in_use_are_reported(qemu: str, tmp_path: Path) -> None:
    done = vmctl("qmp-share", str(tmp_path / "none"), str(tmp_path / "listen"))
    assert (done.returncode, "No such file or directory" in done.stderr) == (1, True)
    make_script(tmp_path / "taken", "")
    with Machine(qemu, 1) as foreign:
        done = vmctl("qmp-share", str(foreign.path(0)), str(tmp_path / "taken"))
    assert (done.returncode, "Address already in use" in done.stderr) == (1, True)
    assert (tmp_path / "taken").exists()


#: The most KiB that a client that does not read may cost: 1 MiB each of commands and replies, and data in buffers.
HELD = 6144


@pytest.mark.parametrize("question", [b'{"execute":"query-qmp-schema"}' * 100, b"]" * 4096], ids=["large", "small"])
def test_a_client_that_does_not_read_costs_little_memory(qemu: str, tmp_path: Path, question: bytes) -> None:
    """Only this client is held back, each time that it connects; another client is served meanwhile."""
    listen = str(tmp_path / "shared.sock")
    with (
        Machine(qemu, 1) as foreign,
        sharing(str(foreign.path(0)), listen) as share,
        closing(Client.connect(listen)) as honest,
    ):
        honest.run("query-qmp-schema")
        before = resident(share.pid)
        for _ in range(2):
            with closing(Client.connect(listen)) as stalled:
                peak = ask_until_held_back(stalled, question, lambda: look(honest, share.pid))
            assert peak < before + HELD
            assert honest.run("query-name") == {"return": {}}
            assert resident(share.pid) < before + HELD


def ask_until_held_back(stalled: Client, question: bytes, meanwhile: Callable[[], int]) -> int:
    """Send commands without reading until no more are taken; returns the largest result of `meanwhile`."""
    stalled.socket.setblocking(False)
    largest = refused = 0
    # The socket counts as full if it refuses data while another client is served this many times.
    while refused < 100:
        try:
            stalled.socket.send(question)
            refused = 0
        except BlockingIOError:
            refused += 1
        largest = max(largest, meanwhile())
    return largest


def look(honest: Client, pid: int) -> int:
    assert honest.run("query-name") == {"return": {}}
    return resident(pid)


def resident(pid: int) -> int:
    """Return the resident memory of a process in KiB."""
    found = re.search(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])

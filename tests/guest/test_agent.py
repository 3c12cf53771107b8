# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the agent in the built-in guest: it runs commands, passes their streams, and survives failures."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator

import pytest

from tests.guest.agent_host import AgentMachine, Command, booted
from vmspawn.agent import protocol
from vmspawn.agent.protocol import (
    Exited,
    Failed,
    InputClosed,
    Malformed,
    Pong,
    Ready,
    Refused,
    Run,
    Signalled,
    Started,
)

MIB = 1 << 20
SIGKILL, SIGPIPE, SIGTERM = 9, 13, 15

EVERY_BYTE = bytes(range(256))


@pytest.fixture(scope="module")
def machine(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentMachine]:
    """Boot one machine for all tests that do not change it."""
    with booted(qemu, tmp_path_factory.mktemp("agent")) as machine:
        yield machine


def shell(machine: AgentMachine, script: str) -> str:
    """Run a script in the guest, which must succeed, and return its output."""
    done = machine.run("sh", "-c", script)
    assert (done.status, done.stderr) == (0, b""), done
    return done.stdout.decode()


def wait_in_guest(machine: AgentMachine, condition: str) -> None:
    """Wait until a condition holds in the guest."""
    # The pattern does not match itself in the arguments of the process that runs this check.
    runs = 'runs() { ps -o args | grep -q "^$1"; };'
    shell(machine, f"{runs} n=0; until {condition}; do usleep 20000; n=$((n + 1)); [ $n -lt 1500 ] || exit 1; done")


# Arguments, environment and streams


@pytest.mark.parametrize("status", [0, 1, 3, 126, 255])
def test_an_exit_status_comes_back(machine: AgentMachine, status: int) -> None:
    assert machine.run("sh", "-c", f"exit {status}").end == Exited(status, 0, 0)


@pytest.mark.parametrize("signal", [SIGKILL, SIGTERM])
def test_the_signal_that_ended_a_command_comes_back(machine: AgentMachine, signal: int) -> None:
    assert machine.run("sh", "-c", f"kill -{signal} $$").end == Signalled(signal, 0, 0)


def test_stdout_and_stderr_stay_apart(machine: AgentMachine) -> None:
    done = machine.run("sh", "-c", "echo out; echo err >&2; echo more; exit 5")
    assert (done.stdout, done.stderr, done.status) == (b"out\nmore\n", b"err\n", 5)


@pytest.mark.parametrize("script", ["cat", "cat >&2", "cat >/dev/stdout", "cat >/dev/stderr"])
def test_every_byte_passes_both_ways(machine: AgentMachine, script: str) -> None:
    done = machine.run("sh", "-c", script, data=EVERY_BYTE)
    assert done.stdout + done.stderr == EVERY_BYTE


def test_megabytes_pass_both_ways(machine: AgentMachine) -> None:
    data = random.Random(17).randbytes(4 * MIB)
    assert machine.run("cat", data=data).stdout == data


def test_the_end_of_input_is_seen(machine: AgentMachine) -> None:
    assert machine.run("wc", "-c").stdout == b"0\n"
    assert machine.run("wc", "-c", data=b"12345").stdout == b"5\n"


def test_a_command_without_a_port_for_stdin_reads_from_dev_null(machine: AgentMachine) -> None:
    assert machine.run("readlink", "/proc/self/fd/0", stdin=False).stdout == b"/dev/null\n"


@pytest.mark.parametrize(
    "argument",
    [
        b"",
        b" ",
        b"  a  b ",
        b"a\nb\n",
        b"'\"$HOME`id`\\",
        b"%",
        b"%41",
        b";",
        b";\n",
        b"\xff\xfe",
        b"--",
        EVERY_BYTE[1:],
    ],
)
def test_arguments_arrive_as_they_are(machine: AgentMachine, argument: bytes) -> None:
    assert machine.run("printf", "[%s]", argument, b"", argument).stdout == b"[%b][][%b]" % (argument, argument)


def test_long_arguments_arrive(machine: AgentMachine) -> None:
    long = random.Random(1).randbytes(100_000).replace(b"\0", b"\n")
    assert machine.run("printf", "%s", long).stdout == long


def test_many_arguments_arrive(machine: AgentMachine) -> None:
    assert machine.run("sh", "-c", "echo $#", "sh", *([b"x"] * 20_000)).stdout == b"20000\n"


def test_the_environment_is_that_of_a_login(machine: AgentMachine) -> None:
    assert dict(line.split("=", 1) for line in machine.run("env").stdout.decode().splitlines()) == {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "USER": "root",
        "LOGNAME": "root",
        "SHELL": "/bin/sh",
    }


def test_variables_are_added_and_replaced(machine: AgentMachine) -> None:
    value = b"a b\n\xff;%"
    done = machine.run("sh", "-c", 'printf "%s|%s" "$HOME" "$X"', environment={b"X": value, b"HOME": b"/tmp"})
    assert done.stdout == b"/tmp|%b" % value


def test_a_command_is_searched_in_the_path_of_its_own_environment(machine: AgentMachine) -> None:
    shell(machine, "printf '#!/bin/sh\\necho mine\\n' >/tmp/mine; chmod +x /tmp/mine")
    assert machine.run("mine", environment={b"PATH": b"/nowhere:/tmp:/bin"}).stdout == b"mine\n"
    assert machine.run("mine").status == 127


def test_a_command_starts_in_the_home_directory_or_in_the_given_one(machine: AgentMachine) -> None:
    assert machine.run("pwd").stdout == b"/root\n"
    assert machine.run("pwd", directory=b"/sys/class").stdout == b"/sys/class\n"
    assert machine.run("pwd", user=b"4242").stdout == b"/\n"


def test_a_missing_directory_is_a_failure_with_status_125(machine: AgentMachine) -> None:
    assert machine.run("pwd", directory=b"/missing").end == Failed(125, errno.ENOENT, "chdir")


def test_a_command_runs_with_the_ids_groups_and_home_of_its_user(machine: AgentMachine) -> None:
    shell(
        machine,
        "echo 'ann:x:1001:1002:Ann:/home/ann:/bin/sh' >>/etc/passwd; mkdir -p /home/ann;"
        "printf 'ann:x:1002:\\nwheel:x:1010:bob,ann\\nother:x:1011:annie\\n' >>/etc/group",
    )
    for name in (b"ann", b"1001"):
        done = machine.run("sh", "-c", "id -u; id -G; echo $USER $HOME; pwd; echo >/dev/stdout", user=name)
        assert done.stdout == b"1001\n1002 1010\nann /home/ann\n/home/ann\n\n"
    assert machine.run("sh", "-c", "id -u; id -G", user=b"4242").stdout == b"4242\n4242\n"
    assert machine.run("true", user=b"nobody-here").end == Failed(125, errno.ENOENT, "user")


@pytest.mark.parametrize(
    ("command", "status", "reason"),
    [
        ("no-such-program", 127, errno.ENOENT),
        ("/no/such/program", 127, errno.ENOENT),
        ("/etc/passwd", 126, errno.EACCES),
        ("/etc", 126, errno.EACCES),
    ],
)
def test_a_command_that_cannot_be_executed_fails_as_in_a_shell(
    machine: AgentMachine, command: str, status: int, reason: int
) -> None:
    assert machine.run(command).end == Failed(status, reason, "exec")


def test_a_script_without_an_interpreter_is_run_by_the_shell(machine: AgentMachine) -> None:
    shell(machine, "echo 'echo $0 $#' >/tmp/script; chmod +x /tmp/script")
    assert machine.run("/tmp/script", "a", "b").stdout == b"/tmp/script 2\n"


def test_a_command_blocks_and_ignores_no_signals(machine: AgentMachine) -> None:
    output = machine.run("grep", "-E", "Sig(Blk|Ign)", "/proc/self/status").stdout
    assert output.split()[1::2] == [b"0" * 16, b"0" * 16]


def test_32_commands_run_at_once(machine: AgentMachine) -> None:
    commands = []
    for number in range(32):
        # One at a time: QEMU's queue of port notifications has room for ten ports
        command = machine.start("cat")
        command.wait(Started)
        command.sockets["stdin"].sendall(b"%d" % number)
        commands.append(command)
    for number, command in enumerate(commands):
        command.read_until(b"%d" % number, "stdout")
    for command in commands:
        command.close_stdin()
    for number, command in enumerate(commands):
        assert command.end() == Exited(0, len(str(number)), 0)
        command.unplug()


# Exit statuses


def test_children_in_the_background_live_on_and_are_not_waited_for(machine: AgentMachine) -> None:
    done = machine.run("sh", "-c", "(until [ -e /tmp/go ]; do usleep 10000; done; : >/tmp/lived) & echo done")
    assert (done.status, done.stdout) == (0, b"done\n")
    shell(machine, ": >/tmp/go")
    wait_in_guest(machine, "[ -e /tmp/lived ]")


def test_a_background_process_that_prints_ends_after_its_command(machine: AgentMachine) -> None:
    done = machine.run("sh", "-c", "yes & sleep 0.1; echo done >&2")
    assert (done.status, done.stderr) == (0, b"done\n")
    wait_in_guest(machine, "! pidof yes")


FAMILY = "setsid sleep 1111 & sleep 1112 & (sleep 1113 &) ; echo all; wait"


@pytest.mark.parametrize("way", ["unplug", "message"])
@pytest.mark.parametrize("has_group", [True, False])
def test_a_hang_up_ends_all_processes_of_a_command(machine: AgentMachine, way: str, has_group: bool) -> None:
    if not has_group:
        shell(machine, "mount --move /sys/fs/cgroup /mnt")
    command = machine.start("sh", "-c", FAMILY)
    command.read_until(b"all\n", "stdout")
    if way == "message":
        machine.send(protocol.hang_up(command.run.id))
    else:
        command.unplug()
    wait_in_guest(machine, "! runs 'sleep 111[123]'")
    if way == "message":
        command.unplug()
    if not has_group:
        shell(machine, "mount --move /mnt /sys/fs/cgroup")
    wait_in_guest(machine, f"[ ! -e /sys/fs/cgroup/vmspawn-{command.run.id} ]")


def test_a_signal_reaches_the_command(machine: AgentMachine) -> None:
    command = machine.start("sh", "-c", "trap 'echo got; exit 7' TERM; echo set; while :; do usleep 10000; done")
    command.read_until(b"set\n", "stdout")
    machine.send(protocol.signal(command.run.id, SIGTERM))
    assert command.wait(Exited).status == 7
    command.unplug()


def test_a_command_whose_reader_disconnects_gets_sigpipe(machine: AgentMachine) -> None:
    command = machine.start("yes")
    command.read_until(b"y\n", "stdout")
    command.sockets["stdout"].close()
    assert command.end() == Signalled(SIGPIPE, command.wait(Signalled).stdout, 0)
    command.unplug()


def test_the_host_learns_that_a_command_has_closed_its_input(machine: AgentMachine) -> None:
    command = machine.start("sh", "-c", "exec <&-; read line <>/dev/zero")
    command.wait(Started)
    command.sockets["stdin"].sendall(b"data")
    command.wait(InputClosed)
    command.unplug()


def test_a_command_whose_output_is_not_read_waits(machine: AgentMachine) -> None:
    command = machine.start("head", "-c", str(8 * MIB), "/dev/zero")
    command.wait(Started)
    assert shell(machine, "echo others run") == "others run\n"
    done = command.communicate()
    assert (done.status, len(done.stdout)) == (0, 8 * MIB)


# The terminal


def terminal(machine: AgentMachine, *arguments: str, size: tuple[int, int] = (30, 100)) -> Command:
    return machine.start(*arguments, size=size, environment={b"TERM": b"xterm"})


def test_a_terminal_has_a_size_that_changes(machine: AgentMachine) -> None:
    script = "trap 'stty size; exit' WINCH; tty; stty size; echo $TERM; while :; do usleep 10000; done"
    command = terminal(machine, "sh", "-c", script)
    assert command.read_until(b"xterm\r\n") == b"/dev/pts/0\r\n30 100\r\nxterm\r\n"
    machine.send(protocol.resize(command.run.id, 50, 132))
    assert command.read_until(b"132\r\n") == b"50 132\r\n"
    assert command.end() == Exited(0, command.wait(Exited).stdout, 0)
    command.unplug()


def test_a_terminal_has_job_control(machine: AgentMachine) -> None:
    command = terminal(machine)
    keyboard = command.sockets["stdin"]
    command.read_until(b"# ")
    job = b"""trap "echo contin""ued" CONT; echo st""arted; while sleep 0.1; do :; done"""
    keyboard.sendall(b"echo $0; sh -c '" + job + b"'\n")
    assert b"-sh\r\n" in command.read_until(b"started\r\n")
    keyboard.sendall(b"\x1a")
    command.read_until(b"Stopped")
    command.read_until(b"# ")
    keyboard.sendall(b"fg\n")
    # The shell gives the terminal to the job before it continues the job.
    command.read_until(b"continued\r\n")
    keyboard.sendall(b"\x03")
    command.read_until(b"# ")
    keyboard.sendall(b"exit 9\n")
    assert command.end() == Exited(9, command.wait(Exited).stdout, 0)
    command.unplug()


def test_the_last_output_on_a_terminal_arrives(machine: AgentMachine) -> None:
    command = terminal(machine, "sh", "-c", "head -c 20000 /dev/zero | tr '\\0' x; echo end")
    assert len(command.read_until(b"end\r\n")) == 20_005
    assert command.end() == Exited(0, 20_005, 0)
    command.unplug()


def test_a_terminal_that_is_unplugged_ends_its_session(machine: AgentMachine) -> None:
    command = terminal(machine, "sh", "-c", "trap '' HUP; echo on; sleep 1114; sleep 1115")
    command.read_until(b"on\r\n")
    command.unplug()
    wait_in_guest(machine, "! runs 'sleep 111[45]'")


# The control port


def test_the_agent_answers_a_ping(machine: AgentMachine) -> None:
    machine.send(protocol.ping("abc-1"))
    assert machine.receive(Pong) == Pong("abc-1")


def test_a_command_of_an_earlier_session_is_refused(machine: AgentMachine) -> None:
    run = Run("late", "other", "late", [b"true"])
    machine.send(protocol.run(run))
    assert machine.receive(Refused) == Refused("late", errno.ESTALE, "session")


def test_an_id_in_use_is_refused(machine: AgentMachine) -> None:
    command = machine.start("cat")
    command.wait(Started)
    machine.send(protocol.run(command.run))
    assert machine.receive(Refused) == Refused(command.run.id, errno.EEXIST, "id")
    assert command.communicate(b"still there").stdout == b"still there"


def test_a_new_session_discards_an_incomplete_message(machine: AgentMachine) -> None:
    message = protocol.run(Run("half", machine.session, "half", [b"touch", b"/tmp/half", b"/tmp/whole"]))
    machine.send(message[: message.index(b" /tmp/whole")])
    machine.start_session()
    assert shell(machine, "ls /tmp/half 2>/dev/null || echo none") == "none\n"


def test_an_agent_without_a_manager_uses_little_processor_time(machine: AgentMachine) -> None:
    pid = machine.start_session().pid
    ticks = f"cut -d' ' -f14,15 /proc/{pid}/stat"
    before = sum(map(int, shell(machine, ticks).split()))
    command = machine.start("sh", "-c", "echo on; usleep 1000000; echo off")
    command.read_until(b"on\n", "stdout")
    machine.send(b"run half")
    machine.disconnect()
    # Spend a second without a manager
    command.read_until(b"off\n", "stdout")
    # The next session would kill a command that has not ended
    assert command.end() == Exited(0, 7, 0)
    machine.connect()
    assert machine.receive(Ready).pid == pid
    machine.start_session()
    after = sum(map(int, shell(machine, ticks).split()))
    # A second has 100 ticks
    assert after - before < 20
    command.unplug()


JUNK = (
    b"\n",
    b" ;\n",
    b";\n",
    b"run ;\n",
    b"run x ;\n",
    b"run x SESSION p -- true\n",
    b"run x SESSION p true ;\n",
    b"run x SESSION p colour=red -- true ;\n",
    b"run x SESSION p tty=1 -- true ;\n",
    b"run x SESSION p tty=99999,1 -- true ;\n",
    b"run ../x SESSION p -- true ;\n",
    b"run x SESSION ../p -- true ;\n",
    b"run x SESSION p -- %0 ;\n",
    b"run x SESSION p -- %00 ;\n",
    b"run x SESSION p -- tr\0ue ;\n",
    b"close nobody stdin ;\n",
    b"close nobody status ;\n",
    b"resize nobody 1 1 ;\n",
    b"signal nobody 9 ;\n",
    b"signal nobody 99 ;\n",
    b"hangup nobody ;\n",
    b"clock 1 2 ;\n",
    b"sync " + b"n" * 65 + b" ;\n",
    b"x " * 40_000 + b";\n",
    b"y" * 600_000 + b"\n",
)


def test_bad_messages_are_refused_one_by_one(machine: AgentMachine) -> None:
    for junk in JUNK[1:]:
        machine.send(junk.replace(b"SESSION", machine.session.encode()))
        assert isinstance(machine.receive(Refused | Malformed), Refused), junk[:80]  # type: ignore[arg-type]
    assert machine.run("true").status == 0


def test_the_agent_survives_random_messages(machine: AgentMachine) -> None:
    pid = machine.start_session().pid
    chance = random.Random(4)
    good = protocol.run(Run("junk", machine.session, "junk", [b"echo", b"a b"], {b"A": b"b"}))
    for _ in range(300):
        piece = bytearray(chance.choice([good, *JUNK[:-2]]))
        for _ in range(chance.randrange(4)):
            piece[chance.randrange(len(piece)) :] = chance.randbytes(chance.randrange(40))
            piece += b"\n;"
        machine.send(bytes(piece))
    assert machine.start_session().pid == pid
    assert machine.run("echo", "fine").stdout == b"fine\n"


def test_commands_outlive_the_agent(machine: AgentMachine) -> None:
    pid = machine.start_session().pid
    command = machine.start("cat")
    command.wait(Started)
    assert machine.run("kill", "-9", str(pid)).status == 0
    assert machine.receive(Ready).pid != pid
    machine.start_session()
    machine.send(protocol.signal(command.run.id, SIGTERM))
    assert machine.receive(Refused) == Refused(command.run.id, errno.ESRCH, "id")
    assert command.communicate(b"alive").stdout == b"alive"


@pytest.mark.soak
def test_a_command_whose_ports_never_come_is_refused(machine: AgentMachine) -> None:
    machine.send(protocol.run(Run("portless", machine.session, "none", [b"true"])))
    assert machine.receive(Refused) == Refused("portless", errno.ETIMEDOUT, "ports")


# Failures in the guest


def test_commands_run_without_proc_and_on_a_read_only_root(machine: AgentMachine) -> None:
    shell(machine, "mount -o remount,ro / && umount -l /proc")
    done = machine.run("sh", "-c", "echo fine; : >/read-only")
    assert (done.stdout, done.status) == (b"fine\n", 1)
    command = machine.start("sh", "-c", "sleep 1116 & echo on; wait")
    command.read_until(b"on\n", "stdout")
    command.unplug()
    shell(machine, "mount -t proc proc /proc && mount -o remount,rw /")
    wait_in_guest(machine, "! runs 'sleep 1116'")


def test_a_command_that_uses_all_memory_is_killed_alone(machine: AgentMachine) -> None:
    pid = machine.start_session().pid
    assert machine.run("tail", "/dev/zero").end == Signalled(SIGKILL, 0, 0)
    assert machine.start_session().pid == pid


def test_commands_leave_no_processes_behind(machine: AgentMachine) -> None:
    # Two processes remain: the agent, and the supervisor of the command that counts them.
    wait_in_guest(machine, "[ $(pidof agent | wc -w) = 2 ]")
    assert shell(machine, "ps -o stat | grep -c Z || :") == "0\n"

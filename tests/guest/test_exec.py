# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests commands in the guest through the library: their streams, their ends, and failures."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.commands import one_line, vmctl
from tests.machines import Machine, fresh_name
from vmspawn import Execution
from vmspawn.agent.protocol import PORTS, STATUS
from vmspawn.errors import CommandFailed, NoFreePort, NotConnected, NotSupported, Timeout, UsageError
from vmspawn.inside.commands import COMMANDS_MAX
from vmspawn.inside.streams import KEPT

pytestmark = pytest.mark.asyncio(loop_scope="module")

MIB = 1 << 20
EVERY_BYTE = bytes(range(256))
DEADLINE = 60.0


@contextlib.asynccontextmanager
async def started(qemu: str, *, control: bool = False) -> AsyncIterator[Machine]:
    """Start a copy of a guest that has booted."""
    settings: dict[str, Any] = {"guest": "builtin", "warm": True, "qemu": qemu, "console": "headless"}
    async with Machine(name=fresh_name(), control=control, **settings) as machine:
        assert (await machine.run("true")).status == 0
        yield machine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def machine(qemu: str) -> AsyncIterator[Machine]:
    """Yield one machine for all tests that do not change it."""
    async with started(qemu) as machine:
        yield machine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mortal(qemu: str) -> AsyncIterator[Machine]:
    """Yield one machine for tests that reset it. The last of them suspends it, and then it cannot be powered off."""
    async with started(qemu, control=True) as machine:
        yield machine


async def objects(machine: Machine) -> tuple[set[str], set[str]]:
    """Return the names of QEMU's character devices, and of its devices."""
    chardevs = {each["label"] for each in await machine.monitor.execute("query-chardev")}
    devices = {each["name"] for each in await machine.monitor.execute("qom-list", {"path": "/machine/peripheral"})}
    return chardevs, devices


async def until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    """Wait until a condition holds. If it does not, the test fails with the message `what`."""
    try:
        async with asyncio.timeout(DEADLINE):
            while not await condition():  # noqa: ASYNC110 - the guest and QEMU set no asyncio.Event
                await asyncio.sleep(0.02)
    except TimeoutError:
        pytest.fail(f"{what} after {DEADLINE:g} s")


async def until_runs(machine: Machine, command: str) -> None:
    """Wait until a command runs in the guest."""

    async def runs() -> bool:
        return (await machine.run(f"ps -o args | grep '^{command}'")).status == 0

    await until(runs, f"{command} does not run")


async def start_client(machine: Machine) -> asyncio.Task[subprocess.CompletedProcess[str]]:
    """Start `vmctl exec` with a command that does not end by itself, and wait until the command runs."""
    client = asyncio.create_task(asyncio.to_thread(vmctl, "exec", machine.name, "sleep", "81234"))
    await until_runs(machine, "sleep 81234")
    return client


async def execute_once_started(machine: Machine, script: str) -> Execution:
    """Start a command, and let its script begin only after the manager has reported the start."""
    command = await machine.execute(["sh", "-c", f"read -r line; {script}"])
    assert command.stdin is not None
    command.stdin.write(b"\n")
    await command.stdin.drain()
    return command


async def expect_failure(client: asyncio.Task[subprocess.CompletedProcess[str]], reason: str) -> None:
    """Wait for the end of `vmctl exec`, which reports the reason."""
    done = await client
    assert done.returncode == 125
    assert one_line(done, "vmctl").endswith(f"the command was ended: {reason}")


async def until_idle(machine: Machine) -> None:
    """Wait until no ports of commands are plugged in, except those that are kept for later commands."""

    streams = machine._inside.commands._streams

    async def is_idle() -> bool:
        # A character device is removed after its port.
        left = [sum(name.startswith("stream") for name in names) for names in await objects(machine)]
        return not streams._used and not streams._plugging and left == [len(streams._idle) * len(PORTS)] * 2

    await until(is_idle, "ports of commands are left")


# Arguments, environment and streams


@pytest.mark.parametrize("status", [0, 1, 3, 126, 255])
async def test_an_exit_status_comes_back(machine: Machine, status: int) -> None:
    done = await machine.run(f"exit {status}")
    assert (done.status, done.stdout, done.stderr) == (status, "", "")


async def test_a_signal_is_reported_as_128_plus_its_number(machine: Machine) -> None:
    assert (await machine.run("kill -9 $$")).status == 137


async def test_stdout_and_stderr_stay_apart(machine: Machine) -> None:
    done = await machine.run("echo out; echo err >&2; echo more")
    assert (done.stdout, done.stderr) == ("out\nmore\n", "err\n")


async def test_every_byte_passes_both_ways(machine: Machine) -> None:
    data = EVERY_BYTE * 4096
    done = await machine.run(["cat"], input=data, text=False)
    assert done.stdout == data


async def test_arguments_are_passed_as_they_are(machine: Machine) -> None:
    arguments: list[str | bytes]
    arguments = ["", " ", "a b", "'", '"', "\n", "$HOME", "`id`", "\\", "*", "%41", ";", b"\xff\x80", "--", "-n", "é"]
    done = await machine.run(["printf", "%s\\0", *arguments], text=False)
    assert done.stdout.split(b"\0")[:-1] == [each if isinstance(each, bytes) else each.encode() for each in arguments]


async def test_a_hundred_kilobytes_of_arguments_arrive(machine: Machine) -> None:
    arguments = [f"{number:0100d}" for number in range(1000)]
    done = await machine.run(["sh", "-c", 'echo $#; echo "$1000" | wc -c; shift 999; echo "$1"', "sh", *arguments])
    assert done.stdout.splitlines()[0] == "1000"
    assert done.stdout.splitlines()[-1] == arguments[-1]


async def test_a_nul_is_refused(machine: Machine) -> None:
    with pytest.raises(UsageError, match="NUL"):
        await machine.run(["echo", "a\0b"])


async def test_a_command_gets_its_environment_directory_and_user(machine: Machine) -> None:
    done = await machine.run('echo "$A" "$PWD" "$(id -u)"', env={"A": "b c"}, cwd="/tmp", user="1234")
    assert done.stdout == "b c /tmp 1234\n"


async def test_a_missing_directory_is_reported(machine: Machine) -> None:
    done = await machine.run("true", cwd="/nowhere")
    assert done.status in (125, 126, 127)
    assert "No such file" in done.stderr


async def test_a_program_that_is_missing_or_not_executable_fails_as_in_a_shell(machine: Machine) -> None:
    with pytest.raises(CommandFailed) as failed:
        await machine.execute(["no-such-program"])
    assert failed.value.status == 127
    done = await machine.run(["/etc/passwd"])
    assert done.status == 126


async def test_a_failure_is_an_exception_with_check(machine: Machine) -> None:
    with pytest.raises(CommandFailed, match="status 3: why") as failed:
        await machine.run("echo out; echo why >&2; exit 3", check=True)
    assert (failed.value.status, failed.value.stdout) == (3, b"out\n")


async def test_a_command_that_takes_too_long_is_killed(machine: Machine) -> None:
    with pytest.raises(Timeout, match="was killed"):
        await machine.run("sleep 1000 & sleep 1000", timeout=1)
    done = await machine.run("ps -o args | grep -c '^sleep 1000' || true")
    assert done.stdout == "0\n"


async def test_streams_can_be_used_while_the_command_runs(machine: Machine) -> None:
    async with await machine.execute(["cat"]) as command:
        assert command.stdin is not None
        assert command.stdout is not None
        for line in (b"one\n", b"two\n"):
            command.stdin.write(line)
            assert await command.stdout.readline() == line
        command.stdin.write_eof()
        assert await command.wait() == 0
        assert await command.stdout.read() == b""


async def test_a_command_without_stdin_reads_an_empty_input(machine: Machine) -> None:
    async with await machine.execute(["cat"], stdin=False) as command:
        assert command.stdin is None
        assert await command.wait() == 0


async def test_terminate_sends_sigterm(machine: Machine) -> None:
    script = 'trap "echo got; exit 5" TERM; echo ready; while :; do sleep 0.05; done'
    async with await machine.execute(["sh", "-c", script]) as command:
        assert command.stdout is not None
        await command.stdout.readline()
        await command.terminate()
        assert await command.stdout.readline() == b"got\n"
        assert await command.wait() == 5


async def test_a_terminal_is_resized_and_interrupts_its_command(machine: Machine) -> None:
    async with await machine.execute([], size=(30, 100)) as command:
        assert command.stdin is not None
        assert command.stdout is not None
        assert command.stderr is None
        command.stdin.write(b"stty size; tty; echo do'ne'\n")
        assert b"30 100" in await command.stdout.readuntil(b"done")
        await command.resize(40, 120)
        # The new size and the keys arrive on different ports, in any order.
        command.stdin.write(b"until stty size | grep '40 120'; do usleep 10000; done; echo do'ne'\n")
        assert b"\n40 120" in await command.stdout.readuntil(b"done\r\n")
        command.stdin.write(b"sleep 1000\n")
        await command.stdout.readuntil(b"1000\r\n")
        await until_runs(machine, "sleep 1000")
        command.stdin.write(b"\x03")
        await command.stdout.readuntil(b"vmspawn# ")
        command.stdin.write(b"echo $?; exit 4\n")
        await command.stdout.readuntil(b"130")
        assert await command.wait() == 4


async def test_the_end_of_a_terminals_input_does_not_end_its_output(machine: Machine) -> None:
    async with await machine.execute(["sh", "-c", "cat; echo; seq 1 300"], size=(24, 80)) as command:
        async with asyncio.timeout(DEADLINE):
            output, errors = await command.communicate(b"unfinished line")
        assert output.endswith(b"".join(b"%d\r\n" % number for number in range(1, 301)))
        assert (await command.wait(), errors) == (0, b"")


# The end of a client and of its commands


async def test_children_in_the_background_live_on(machine: Machine) -> None:
    done = await machine.run("sleep 54321 >/dev/null 2>&1 & echo started")
    assert done.stdout == "started\n"
    assert (await machine.run("ps -o args | grep -c '^sleep 54321'")).stdout == "1\n"
    await machine.run("kill $(ps -o pid,args | awk '/sleep 54321$/ {print $1}')")


async def test_closing_a_command_ends_all_its_processes(machine: Machine) -> None:
    async with await machine.execute(["sh", "-c", "(setsid sleep 64321 &); echo x; exec sleep 64321"]) as command:
        assert command.stdout is not None
        await command.stdout.readline()

    async def is_gone() -> bool:
        return (await machine.run("ps -o args | grep -c '^sleep 64321' || true")).stdout == "0\n"

    await until(is_gone, "the command lives")


async def test_the_streams_of_a_killed_command_end(machine: Machine) -> None:
    """The command's transports keep their descriptors until the streams end, so later streams get other descriptors."""
    async with await machine.execute(["cat"]) as command:
        assert command.stdin is not None
        assert command.stdout is not None
        command.stdin.write(b"line\n")
        assert await command.stdout.readline() == b"line\n"
        await command.kill()
        done = await asyncio.gather(*(machine.run(["cat"], input=b"x", text=False) for _ in range(4)))
        assert [each.stdout for each in done] == [b"x"] * 4
        async with asyncio.timeout(DEADLINE):
            assert await command.stdout.read() == b""
        with pytest.raises(NotConnected, match="was ended"):
            await command.wait()


async def test_a_status_port_that_breaks_the_protocol_ends_the_command(machine: Machine) -> None:
    async with await machine.execute(["sleep", "75321"]) as command:
        [execution] = machine._inside.commands._running.values()
        # QEMU writes the guest's messages to this end of the socket.
        execution.ports.streams[STATUS].theirs.send(b"nonsense\n")
        with pytest.raises(NotConnected, match="broke its protocol"):
            await command.wait()

    async def is_gone() -> bool:
        return (await machine.run("ps -o args | grep -c '^sleep 75321' || true")).stdout == "0\n"

    await until(is_gone, "the command lives")


async def test_commands_leave_no_ports_and_descriptors_behind(machine: Machine) -> None:
    async def beside_ports() -> tuple[int, int]:
        """Return the numbers of character devices and of this process's descriptors, except those of idle ports."""
        chardevs, devices = await objects(machine)
        ports = len([name for name in devices if name.startswith("stream")])
        # A port has two descriptors in this process: its end of the socket pair, and a copy of QEMU's end.
        return len(chardevs) - ports, len(os.listdir("/proc/self/fd")) - 2 * ports

    await machine.run("true")
    await until_idle(machine)
    before = await beside_ports()
    for number in range(20):
        await machine.run(f"exit {number}")
    with contextlib.suppress(Timeout):
        await machine.run("sleep 1000", timeout=0.1)
    await until_idle(machine)

    async def is_as_before() -> bool:
        # Objects of earlier tests may have been removed meanwhile.
        return all(now <= then for now, then in zip(await beside_ports(), before, strict=True))

    await until(is_as_before, "character devices or descriptors are left")


# Load


async def test_thirty_two_commands_run_at_once(machine: Machine) -> None:
    numbers = list(range(COMMANDS_MAX))
    random.shuffle(numbers)
    done = await asyncio.gather(*(machine.run(["cat"], input=str(number) * 1000) for number in numbers))
    assert [each.stdout for each in done] == [str(number) * 1000 for number in numbers]


async def test_a_disk_is_detached_while_thirty_two_commands_run(machine: Machine, tmp_path: Path) -> None:
    from tests.conftest import make_raw
    from vmspawn import Disk

    disk = await machine.attach(Disk(str(make_raw(tmp_path / "disk", MIB)), "data", "virtio-scsi"))
    async with contextlib.AsyncExitStack() as stack:
        commands = [await stack.enter_async_context(await machine.execute(["cat"])) for _ in range(COMMANDS_MAX)]
        with pytest.raises(NoFreePort, match="32 commands run"):
            await machine.execute(["cat"])
        inputs = [str(number).encode() * 1000 for number in range(COMMANDS_MAX)]
        talks = [command.communicate(data) for command, data in zip(commands, inputs, strict=True)]
        is_detached, *outputs = await asyncio.gather(machine.detach(disk.name), *talks)
        assert is_detached
        assert outputs == [(data, b"") for data in inputs]
        assert [command.status for command in commands] == [0] * COMMANDS_MAX
    assert (await machine.run("true")).status == 0


async def test_a_command_without_a_free_port_is_refused(machine: Machine) -> None:
    await until_idle(machine)
    pool = machine._inside.commands._ports._pool
    taken = [pool.take() for _ in range(pool.free)]
    try:
        async with contextlib.AsyncExitStack() as stack:
            with pytest.raises(NoFreePort, match=r"no free virtio-serial port: all \d+ are in use") as failed:
                for _ in range(KEPT + 1):
                    await stack.enter_async_context(await machine.execute(["cat"]))
        assert "until a command has ended" in failed.value.hint
    finally:
        for place in taken:
            pool.release(place)
    done = await asyncio.gather(*(machine.run(["cat"], input="x") for _ in range(KEPT + 1)))
    assert [each.stdout for each in done] == ["x"] * (KEPT + 1)


async def test_a_command_whose_output_is_not_read_waits(machine: Machine) -> None:
    before = _resident()
    async with await machine.execute(["sh", "-c", "echo started >&2; exec cat /dev/zero"]) as command:
        assert command.stderr is not None
        await command.stderr.readline()
        assert (await machine.run("true")).status == 0
        assert _resident() - before < 32 * MIB
        assert command.status is None


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# Failures


async def test_a_pause_does_not_end_a_command(machine: Machine) -> None:
    async with await machine.execute(["cat"]) as command:
        assert command.stdin is not None
        assert command.stdout is not None
        await machine.pause()
        command.stdin.write(b"paused\n")
        with pytest.raises(Timeout, match="paused"):
            await machine.execute(["true"], start_timeout=0.5)
        await machine.resume()
        assert await command.stdout.readline() == b"paused\n"
        command.stdin.write_eof()
        assert await command.wait() == 0
    assert (await machine.run("true")).status == 0


async def test_commands_outlive_the_agent(machine: Machine) -> None:
    async with await machine.execute(["sh", "-c", "read line; echo $line; exit 6"]) as command:
        assert command.stdin is not None
        await machine.run("kill -9 $(pidof agent | tr ' ' '\\n' | sort -n | head -n 1)")
        # Commands outlive the agent, and a new agent runs new commands.
        assert (await machine.run("echo again")).stdout == "again\n"
        command.stdin.write(b"hello\n")
        assert await command.wait() == 6


async def test_commands_run_beside_full_and_read_only_file_systems(machine: Machine) -> None:
    done = await machine.run("mount -t tmpfs -o size=4k tmpfs /mnt; cd /mnt; cat /dev/zero >fill; echo $?; umount /mnt")
    assert "No space" in done.stderr
    await machine.run("cd /; umount /mnt")
    done = await machine.run("mount -o remount,ro / && touch /x; s=$?; mount -o remount,rw /; exit $s")
    assert done.status == 1
    assert (await machine.run("echo fine")).stdout == "fine\n"


@pytest.mark.parametrize("by_guest", [False, True])
async def test_a_reset_ends_the_commands(mortal: Machine, by_guest: bool) -> None:
    client = await start_client(mortal)
    command = await execute_once_started(mortal, "reboot -f" if by_guest else "sleep 1000")
    if not by_guest:
        await mortal.reboot()
    with pytest.raises(NotConnected, match="rebooted"):
        await command.wait()
    await command.close()
    # The agent is not up yet, so commands wait for it.
    with pytest.raises(Timeout, match="did not answer"):
        await mortal.execute(["true"], start_timeout=0.05)
    assert (await mortal.run("echo back")).stdout == "back\n"
    await expect_failure(client, "the guest was rebooted")


async def test_a_suspension_ends_the_commands(mortal: Machine) -> None:
    client = await start_client(mortal)
    command = await execute_once_started(mortal, "echo mem >/sys/power/state; sleep 1000")
    with pytest.raises(NotConnected, match="suspended"):
        await command.wait()
    await command.close()
    await expect_failure(client, "the guest was suspended")
    await mortal.resume()
    assert (await mortal.run("echo awake")).stdout == "awake\n"


async def test_a_power_off_ends_the_commands(qemu: str) -> None:
    async with started(qemu, control=True) as machine:
        client = await start_client(machine)
        command = await execute_once_started(machine, "poweroff -f; sleep 1000")
        with pytest.raises(NotConnected, match="powered off"):
            await command.wait()
        await command.close()
        await expect_failure(client, "the guest powered off")
        with pytest.raises(NotConnected):
            await machine.run("true")


async def test_a_machine_without_an_agent_refuses_commands(qemu: str) -> None:
    settings: dict[str, Any] = {"guest": "builtin", "console": "headless", "agent": False, "control": True}
    async with Machine(qemu=qemu, name=fresh_name(), **settings) as machine:
        with pytest.raises(NotSupported, match="without a port for the agent"):
            await machine.run("true")
        done = await asyncio.to_thread(vmctl, "exec", machine.name, "true")
        assert done.returncode == 125
        assert one_line(done, "vmctl").endswith("without a port for the agent: with --agent=no, or by an older vmspawn")
        assert "restart the machine to run commands in it" in done.stderr


async def test_an_adoption_ends_the_commands_of_the_previous_manager(qemu: str) -> None:
    async with started(qemu) as machine:
        command = await machine.execute(["sh", "-c", "exec sleep 74321"])
        # Close the agent's port, as the end of the manager's process does.
        machine._inside.commands.agent.close()
        await machine.leave()
        await command.close()
        adopted = await Machine.adopt(machine.name)
        try:
            await adopted._inside.settle()
            assert (await adopted.run("ps -o args | grep -c '^sleep 74321' || true")).stdout == "0\n"
            await until_idle(adopted)
        finally:
            await adopted.close()

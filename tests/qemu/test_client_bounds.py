# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the limits of one client's connections, bytes, descriptors, turns and commands (docs/security.md).

A client that reaches a limit is served. A client that exceeds a limit affects only itself.
"""

import array
import asyncio
import contextlib
import os
import pty
import resource
import signal
import socket
import tty
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.callers import served_machine
from tests.machines import Machine
from vmspawn import Event
from vmspawn.console.hotkeys import Key
from vmspawn.console.hub import CLIENTS_MAX, INPUT_MAX
from vmspawn.console.keyboard import TYPED_MAX, Keyboard
from vmspawn.control.connection import DESCRIPTORS_MAX, MESSAGE_MAX
from vmspawn.control.server import CONNECTIONS_MAX
from vmspawn.host import runtime
from vmspawn.host.limits import DESCRIPTORS, allow_descriptors
from vmspawn.qmp import limits
from vmspawn.qmp.share.session import Session

pytestmark = pytest.mark.asyncio(loop_scope="module")

#: Seconds that any step may take.
DEADLINE = 60.0

#: Bytes that the console's readers read at once.
RECEIVE_MAX = 65536

DESCRIBE = b'{"method":"io.systemd.MachineInstance.Describe"}'
QUERY = b'{"execute":"query-name"}'


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def machine(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Machine]:
    """Run a machine with a control socket, and with a transcript in `qmp.log`."""
    folder = tmp_path_factory.mktemp("idle")
    async with served_machine(qemu, folder, qmp_log=str(folder / "qmp.log")) as running:
        yield running


async def end_of(reader: asyncio.StreamReader) -> bytes:
    """Return all bytes until the connection ends, orderly or not."""
    try:
        return await reader.read()
    except ConnectionError:
        return b""


def send_all_it_takes(connected: socket.socket, data: bytes) -> int:
    """Send data as long as the socket accepts it; returns the number of bytes."""
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            sent += connected.send(data)
    return sent


# The control socket.


@pytest.mark.parametrize(("size", "answered"), [(MESSAGE_MAX, True), (MESSAGE_MAX + 1, False)])
async def test_a_call_at_the_size_limit_is_answered_and_a_larger_one_is_not(
    machine: Machine, size: int, answered: bool
) -> None:
    """The message has as many descriptors as the kernel allows."""
    reader, writer = await asyncio.open_unix_connection(machine.directory.file(runtime.CONTROL))
    with writer.get_extra_info("socket").dup() as raw:
        fds = array.array("i", [0] * DESCRIPTORS_MAX)
        assert raw.sendmsg([DESCRIBE[:1]], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)]) == 1
    writer.write(DESCRIBE[1:].ljust(size - 2) + b"\0")
    async with asyncio.timeout(DEADLINE):
        reply = await reader.readuntil(b"\0") if answered else await end_of(reader)
    assert (b'"running":true' in reply) is answered
    writer.close()


async def test_too_many_descriptors_end_the_connection(machine: Machine) -> None:
    """The limit applies to all messages together, even if each has few descriptors."""
    _, writer = await asyncio.open_unix_connection(machine.directory.file(runtime.CONTROL))
    fds = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * 100))]
    sent = 0
    with writer.get_extra_info("socket").dup() as raw:
        raw.setblocking(False)
        async with asyncio.timeout(DEADLINE):
            with pytest.raises(OSError, match=r"."):
                while True:
                    with contextlib.suppress(BlockingIOError):
                        raw.sendmsg([b" "], fds)
                        sent += 100
                    await asyncio.sleep(0)
    assert sent > DESCRIPTORS_MAX
    writer.close()


async def test_one_subscriber_too_many_takes_the_place_of_the_first(machine: Machine) -> None:
    """The disconnected client reads end of file; the others continue."""
    subscribers = []
    async with asyncio.timeout(DEADLINE):
        for _ in range(CONNECTIONS_MAX + 1):
            reader, writer = await asyncio.open_unix_connection(machine.directory.file(runtime.CONTROL))
            writer.write(b'{"method":"io.systemd.MachineInstance.SubscribeEvents","more":true}\0')
            assert b"READY" in await reader.readuntil(b"\0")
            subscribers.append((reader, writer))
        assert await end_of(subscribers[0][0]) == b""
        machine.monitor.publish(Event("TEST", {}))
        for reader, _ in subscribers[1:]:
            assert b'"TEST"' in await reader.readuntil(b"\0")
    for _, writer in subscribers:
        writer.close()


async def test_clients_are_served_once_descriptors_are_available(machine: Machine) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < DESCRIPTORS:
        pytest.skip("this user may not have so many descriptors")
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(4)]
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, before)
        highest = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, before[1]))
        # The test repeats this, because connections of other tests may still be ending.
        for _ in range(10):
            use_up_descriptors(stack)
            await asyncio.sleep(0)
        for client in waiting:
            client.setblocking(False)
            client.connect(machine.directory.file(runtime.CONTROL))
            client.send(DESCRIBE + b"\0")
        for _ in range(10):
            await asyncio.sleep(0)
        for client in waiting:
            with pytest.raises(BlockingIOError):
                client.recv(1)
        allow_descriptors()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == DESCRIPTORS
        async with asyncio.timeout(DEADLINE):
            for client in waiting:
                assert b'"running":true' in await loop.sock_recv(client, 1 << 16)


def use_up_descriptors(stack: contextlib.ExitStack) -> None:
    """Use up this process's descriptors; `stack` releases them."""
    with contextlib.suppress(OSError):
        while True:
            stack.callback(os.close, os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))


# The console.


async def test_one_viewer_too_many_is_disconnected(machine: Machine) -> None:
    path = machine.directory.file(runtime.CONSOLE)
    viewers = [await asyncio.open_unix_connection(path) for _ in range(CLIENTS_MAX + 1)]
    async with asyncio.timeout(DEADLINE):
        await viewers[-1][0].read()
    assert not any(reader.at_eof() for reader, _ in viewers[:-1])
    for _, writer in viewers:
        writer.close()
        await writer.wait_closed()


async def test_input_that_the_guest_does_not_take_waits_with_its_sender(machine: Machine) -> None:
    console = machine.console
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(machine.directory.file(runtime.CONSOLE))
        client.setblocking(False)
        async with asyncio.timeout(DEADLINE):
            while send_all_it_takes(client, b"x" * 4096) or console.input_pending < INPUT_MAX:  # noqa: ASYNC110
                await asyncio.sleep(0)
        # The manager stops reading when INPUT_MAX bytes are pending.
        assert console.input_pending < INPUT_MAX + RECEIVE_MAX


async def test_endless_input_is_dropped_and_the_keys_work(machine: Machine) -> None:
    pressed: list[Key] = []
    dropped: list[None] = []
    with terminal() as (master, slave):
        keyboard = Keyboard(
            machine.console,
            slave,
            terminal=True,
            on_key=pressed.append,
            on_gone=lambda: None,
            on_overflow=lambda: dropped.append(None),
        )
        async with asyncio.timeout(DEADLINE):
            await type_until(dropped, master, b"x" * 4096)
            assert TYPED_MAX <= machine.console.input_pending < TYPED_MAX + RECEIVE_MAX
            await type_until(pressed, master, Key.END.value)
        keyboard.close()
    assert pressed[0] is Key.END
    # The loss is reported once.
    assert len(dropped) == 1


@contextlib.contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    """Open a raw terminal, both ends; the master does not block."""
    master, slave = pty.openpty()
    tty.setraw(slave)
    os.set_blocking(master, False)
    try:
        yield master, slave
    finally:
        os.close(master)
        os.close(slave)


async def type_until(said: list[Key] | list[None], master: int, data: bytes) -> None:
    """Type data again and again until something is reported."""
    while not said:
        with contextlib.suppress(BlockingIOError):
            os.write(master, data)
        await asyncio.sleep(0)


# QMP sessions.


@contextlib.asynccontextmanager
async def session(machine: Machine) -> AsyncIterator[tuple[socket.socket, Session]]:
    """Open a session that has negotiated; yields its client's end, which does not block, and the session."""
    multiplexer = await machine.multiplexer()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    opened = multiplexer.open(theirs, initial=b'{"execute":"qmp_capabilities"}')
    loop, received = asyncio.get_running_loop(), b""
    with ours:
        async with asyncio.timeout(DEADLINE):
            while b'"return"' not in received:
                received += await loop.sock_recv(ours, 1 << 16)
        yield ours, opened


async def test_one_turn_of_a_session_takes_a_few_messages(machine: Machine) -> None:
    """Invalid messages are answered without QEMU, so only this limit lets the other sessions run."""
    async with session(machine) as (client, _), asyncio.timeout(DEADLINE):
        client.send(b"]" * 100)
        turns: list[int] = []
        while sum(turns) < 100:
            await asyncio.sleep(0)
            turns.append(lines_in(client))
        assert max(turns) == limits.MESSAGES_PER_TURN


def lines_in(connected: socket.socket) -> int:
    """Return the number of lines that can be read."""
    count = 0
    with contextlib.suppress(BlockingIOError):
        while data := connected.recv(1 << 20):
            count += data.count(b"\n")
    return count


async def test_input_sent_ahead_waits_in_the_socket(machine: Machine) -> None:
    """The session reads only a little ahead, and one command is in QEMU."""
    async with session(machine) as (client, opened):
        before = opened.bytes_in
        os.kill(machine.pid, signal.SIGSTOP)
        try:
            async with asyncio.timeout(DEADLINE):
                while send_all_it_takes(client, QUERY * 100) or opened.bytes_in - before < limits.READ_AHEAD:  # noqa: ASYNC110
                    await asyncio.sleep(0)
        finally:
            os.kill(machine.pid, signal.SIGCONT)
        assert opened.queued == 1
        assert opened.bytes_in - before <= len(QUERY) + limits.READ_AHEAD + limits.RECEIVE_SIZE


async def test_only_a_few_commands_are_in_flight_at_once(machine: Machine) -> None:
    """Ten clients send commands together; the transcript shows when QEMU got and answered them."""
    assert machine.config.qmp_log
    async with contextlib.AsyncExitStack() as stack, asyncio.timeout(DEADLINE):
        clients = [await stack.enter_async_context(machine.qmp()) for _ in range(10)]
        await asyncio.gather(*(client.execute("query-name") for client in clients for _ in range(10)))
    counts = [0]
    for line in Path(machine.config.qmp_log).read_text().splitlines():  # noqa: ASYNC240 - nothing else runs meanwhile
        _, monitor, direction, message = line.split(" ", 3)
        if monitor == "sessions" and '"event"' not in message and '"QMP"' not in message:
            counts.append(counts[-1] + (1 if direction == "->" else -1))
    assert max(counts) == limits.IN_FLIGHT

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests AcquireQMP on the control socket, with a passed descriptor and by an upgrade, with third-party clients."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from typing import Any

import pexpect
import pytest
import pytest_asyncio
import varlink
from qemu.qmp import QMPClient

from tests.callers import in_thread, served_machine
from tests.machines import Machine, Resources, idle_machine, open_files
from vmspawn.errors import NotConnected, QmpError
from vmspawn.host.runtime import CONTROL
from vmspawn.machine.ending import MachineEvents
from vmspawn.qmp.events import EventStream

pytestmark = pytest.mark.asyncio(loop_scope="module")

ACQUIRE = "io.systemd.QemuMachineInstance.AcquireQMP"
OURS = "io.vmspawn.Machine.AcquireQMP"
DEADLINE = 60.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def machine(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Machine]:
    async with served_machine(qemu, tmp_path_factory.mktemp("idle")) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def no_session_left(machine: Machine) -> AsyncIterator[None]:
    """Check that each test leaves no session behind, and no descriptor of one."""
    await machine.multiplexer()
    before = open_files(os.getpid())
    yield
    async with asyncio.timeout(DEADLINE):
        while machine.sessions:  # noqa: ASYNC110 - a session's end has no event; each turn of the loop may bring it
            await asyncio.sleep(0)
    assert open_files(os.getpid()) == before


def call(
    machine: Machine, method: str, *, upgrade: bool = False, ahead: bytes = b"", **parameters: Any
) -> socket.socket:
    """Make a call on a new connection, followed by more bytes; returns the connection."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(DEADLINE)
    connection.connect(machine.directory.file(CONTROL))
    message = {"method": method, "parameters": parameters, **({"upgrade": True} if upgrade else {})}
    connection.sendall(json.dumps(message).encode() + b"\0" + ahead)
    return connection


def acquire(machine: Machine, **parameters: Any) -> socket.socket:
    """Return a QMP session on the descriptor that came with the reply."""
    method = OURS if parameters else ACQUIRE
    with call(machine, method, **parameters) as connection:
        data, fds, _, _ = socket.recv_fds(connection, 4096, 4)
    assert json.loads(data.rstrip(b"\0")) == {"parameters": {"fileDescriptorIndex": 0}}
    (fd,) = fds
    session = socket.socket(fileno=fd)
    session.settimeout(DEADLINE)
    return session


def upgraded(machine: Machine, ahead: bytes = b"") -> socket.socket:
    """Return a QMP session on the Varlink connection itself, after the Varlink reply."""
    connection = call(machine, ACQUIRE, upgrade=True, ahead=ahead)
    reply = b""
    while not reply.endswith(b"\0"):
        reply += connection.recv(1)
    assert "error" not in json.loads(reply[:-1])
    return connection


def lines(connection: socket.socket, count: int) -> list[dict[str, Any]]:
    with connection.makefile("rb") as file:
        return [json.loads(file.readline()) for _ in range(count)]


@pytest.mark.parametrize("way", [acquire, upgraded])
async def test_the_python_client_of_qemu_works_unmodified(machine: Machine, way: Any) -> None:
    connection = await in_thread(way, machine)
    client = QMPClient("test")
    await client.connect(connection)
    try:
        with client.listener(("STOP", "RESUME")) as events:
            status: Any = await client.execute("query-status")
            assert status["status"] == "running"
            await client.execute("stop")
            await client.execute("cont")
            async with asyncio.timeout(DEADLINE):
                assert [(await events.get())["event"] for _ in range(2)] == ["STOP", "RESUME"]
    finally:
        await client.disconnect()


@contextlib.asynccontextmanager
async def shared_socket(machine: Machine, path: str) -> AsyncIterator[str]:
    """Serve sessions at a socket, for clients that only accept an address."""
    multiplexer = await machine.multiplexer()
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        listener.setblocking(False)
        loop.add_reader(listener, lambda: multiplexer.open(listener.accept()[0]))
        yield path
        loop.remove_reader(listener)


async def test_the_legacy_client_of_qemu_works_unmodified(
    machine: Machine, tmp_path_factory: pytest.TempPathFactory
) -> None:
    script = (
        "import sys; from qemu.qmp.legacy import QEMUMonitorProtocol\n"
        "with QEMUMonitorProtocol(sys.argv[1]) as client:\n"
        "    client.connect(); print(client.cmd('query-status')['status'])"
    )
    async with shared_socket(machine, str(tmp_path_factory.mktemp("legacy") / "qmp")) as path:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", script, path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        async with asyncio.timeout(DEADLINE):
            output, errors = await process.communicate()
    assert (output, process.returncode) == (b"running\n", 0), errors


async def test_qmp_shell_works_unmodified(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> None:
    async with shared_socket(machine, str(tmp_path_factory.mktemp("shell") / "qmp")) as path:
        assert "running" in await in_thread(use_qmp_shell, path)


def use_qmp_shell(path: str) -> str:
    shell = pexpect.spawn(sys.executable, ["-m", "qemu.qmp.qmp_shell", path], encoding="utf-8", timeout=DEADLINE)
    shell.expect("QEMU\\) ")
    shell.sendline("query-status")
    shell.expect("QEMU\\) ")
    found = str(shell.before)
    shell.sendeof()
    shell.expect(pexpect.EOF)
    shell.close()
    return found


async def test_the_reference_varlink_client_acquires_without_a_descriptor(machine: Machine) -> None:
    """The client cannot receive descriptors, so it upgrades. It has only private functions for that."""

    def use() -> list[dict[str, Any]]:
        with (
            varlink.Client(address=f"unix:{machine.directory.file(CONTROL)}") as client,
            client.open("io.systemd.QemuMachineInstance") as instance,
        ):
            instance._send_message(json.dumps({"method": ACQUIRE, "upgrade": True}).encode())
            reply = next(instance._next_message())
            assert "error" not in json.loads(reply)
            connection: socket.socket = instance._connection
            connection.settimeout(DEADLINE)
            connection.sendall(b'{"execute":"qmp_capabilities"}')
            stream = instance._in_buffer
            while stream.count(b"\n") < 2:
                stream += connection.recv(4096)
            return [json.loads(line) for line in stream.splitlines()]

    greeting, negotiated = await in_thread(use)
    assert "QMP" in greeting
    assert negotiated == {"return": {}}


async def test_bytes_sent_ahead_of_the_upgrade_are_served(machine: Machine) -> None:
    ahead = b'{"execute":"qmp_capabilities"}' + b'{"execute":"query-status","id":%d}' * 200 % tuple(range(200))

    def use() -> list[dict[str, Any]]:
        with upgraded(machine, ahead) as connection:
            return lines(connection, 202)

    greeting, negotiated, *replies = await in_thread(use)
    assert "QMP" in greeting
    assert negotiated == {"return": {}}
    assert [reply["id"] for reply in replies] == list(range(200))


async def test_the_upgrade_call_may_be_split_at_every_byte(machine: Machine) -> None:
    call_bytes = json.dumps({"method": ACQUIRE, "upgrade": True}).encode() + b"\0"
    stream = call_bytes + b'{"execute":"qmp_capabilities"}'

    def use(split: int) -> list[dict[str, Any]]:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(DEADLINE)
            connection.connect(machine.directory.file(CONTROL))
            connection.sendall(stream[:split])
            connection.sendall(stream[split:])
            with connection.makefile("rb") as file:
                reply = b"".join(iter(lambda: file.read(1), b"\0"))
                return [json.loads(reply), json.loads(file.readline()), json.loads(file.readline())]

    for split in range(1, len(stream)):
        reply, greeting, negotiated = await in_thread(use, split)
        assert reply == {"parameters": {}}
        assert "QMP" in greeting
        assert negotiated == {"return": {}}


async def test_an_upgrade_of_another_method_is_refused_and_the_connection_continues(machine: Machine) -> None:
    def use() -> tuple[Any, Any]:
        with call(machine, "io.systemd.MachineInstance.Describe", upgrade=True) as connection:
            refused = connection.recv(4096)
            connection.sendall(b'{"method":"io.systemd.MachineInstance.Describe"}\0')
            return json.loads(refused[:-1])["error"], json.loads(connection.recv(4096)[:-1])["parameters"]["running"]

    assert await in_thread(use) == ("org.varlink.service.MethodNotImplemented", True)


async def test_a_session_outlives_the_varlink_connection_that_acquired_it(machine: Machine) -> None:
    connection = await in_thread(acquire, machine)
    assert machine.sessions[0].peer is not None
    assert machine.sessions[0].peer.pid == os.getpid()

    def use() -> list[dict[str, Any]]:
        connection.sendall(b'{"execute":"qmp_capabilities"}{"execute":"query-name","id":"x"}')
        with connection:
            return lines(connection, 3)

    assert (await in_thread(use))[2]["id"] == "x"


async def test_events_reach_every_session_and_every_subscriber(machine: Machine) -> None:
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(machine.qmp()) for _ in range(10)]
        streams: list[EventStream | MachineEvents] = [stack.enter_context(client.events()) for client in clients]
        streams.append(stack.enter_context(machine.events()))
        await machine.pause()
        await machine.resume()
        async with asyncio.timeout(DEADLINE):
            for stream in streams:
                assert [(await anext(stream)).name for _ in range(2)] == ["STOP", "RESUME"]


async def test_a_read_only_session_runs_queries_and_refuses_changes(machine: Machine) -> None:
    connection = await in_thread(lambda: acquire(machine, readOnly=True))

    def use() -> list[dict[str, Any]]:
        connection.sendall(b'{"execute":"qmp_capabilities"}{"execute":"query-status"}{"execute":"stop","id":1}')
        with connection:
            return lines(connection, 4)

    *_, status, refused = await in_thread(use)
    assert status["return"]["status"] == "running"
    assert refused["error"]["class"] == "GenericError"
    assert "read-only" in refused["error"]["desc"]
    assert machine.running


async def test_the_python_api_runs_commands(machine: Machine) -> None:
    async with machine.qmp() as qmp:
        assert (await qmp.execute("query-name"))["name"] == machine.name
        with pytest.raises(QmpError, match="has not been found") as caught:
            await qmp.execute("frob")
    assert caught.value.error_class == "CommandNotFound"


async def test_disks_come_and_go_beside_busy_sessions(
    machine: Machine, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from tests.conftest import make_raw
    from vmspawn import Disk

    path = make_raw(tmp_path_factory.mktemp("disk") / "disk")
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(machine.qmp()) for _ in range(8)]
        before = await Resources.of(machine)
        stop = asyncio.Event()

        async def ask(client: Any) -> int:
            count = 0
            while not stop.is_set():
                assert (await client.execute("query-status"))["running"]
                count += 1
            return count

        asking = [asyncio.create_task(ask(client)) for client in clients]
        for _ in range(20):
            await machine.attach(Disk(str(path), bus="virtio-scsi"))
            await machine.detach("disk")
        stop.set()
        assert all(await asyncio.gather(*asking))
        assert await Resources.of(machine) == before


async def test_fifty_sessions_see_the_end_of_qemu(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    async with idle_machine(qemu, tmp_path_factory.mktemp("idle")) as machine:
        multiplexer = await machine.multiplexer()
        ends = []
        for _ in range(50):
            ours, theirs = socket.socketpair()
            multiplexer.open(ours)
            theirs.settimeout(DEADLINE)
            ends.append(theirs)
        os.kill(machine.pid, signal.SIGKILL)

        def read_to_the_end() -> int:
            total = 0
            for end in ends:
                with end, end.makefile("rb") as file:
                    total += len(file.read().splitlines())
            return total

        assert await in_thread(read_to_the_end) == 50  # each reads its greeting, then end of file
        assert (await machine.wait()).message == "QEMU died of SIGKILL"


async def test_a_cancelled_caller_does_not_end_the_start_of_sessions(
    qemu: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    async with idle_machine(qemu, tmp_path_factory.mktemp("idle")) as machine:
        os.kill(machine.pid, signal.SIGSTOP)
        try:
            impatient = asyncio.create_task(machine.multiplexer())
            patient = asyncio.create_task(machine.multiplexer())
            await asyncio.sleep(0)
            impatient.cancel()
            with pytest.raises(asyncio.CancelledError):
                await impatient
            assert not patient.done()
        finally:
            os.kill(machine.pid, signal.SIGCONT)
        async with asyncio.timeout(DEADLINE):
            assert await patient is await machine.multiplexer()
        async with machine.qmp() as qmp:
            assert (await qmp.execute("query-name"))["name"] == machine.name


async def test_sessions_that_cannot_be_started_are_refused_each_time(
    qemu: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    async with idle_machine(qemu, tmp_path_factory.mktemp("idle")) as machine:
        os.kill(machine.pid, signal.SIGSTOP)
        waiting = asyncio.create_task(machine.multiplexer())
        await asyncio.sleep(0)
        os.kill(machine.pid, signal.SIGKILL)
        async with asyncio.timeout(DEADLINE):
            for attempt in (waiting, machine.multiplexer(), machine.multiplexer()):
                with pytest.raises(NotConnected, match="QEMU closed its monitor"):
                    await attempt


async def test_a_machine_may_end_while_its_sessions_start(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    before = open_files(os.getpid())
    async with idle_machine(qemu, tmp_path_factory.mktemp("idle")) as machine:
        os.kill(machine.pid, signal.SIGSTOP)
        waiting = asyncio.create_task(machine.multiplexer())
        await asyncio.sleep(0)
        os.kill(machine.pid, signal.SIGCONT)
        await machine.close()
        with pytest.raises(NotConnected, match="does not run"):
            await machine.multiplexer()
    await asyncio.gather(waiting, return_exceptions=True)
    assert open_files(os.getpid()) == before

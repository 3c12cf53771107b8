# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests messages on the control socket: in pieces, in floods, from other users, or never read."""

import asyncio
import contextlib
import json
import os
import resource
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.callers import DEADLINE, INSTANCE, Caller, caller, in_thread, ping, served_machine
from tests.conftest import make_raw
from tests.machines import Machine, open_files
from vmspawn.control import connection as limits
from vmspawn.control.server import CONNECTIONS_MAX
from vmspawn.host.runtime import CONTROL

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def machine(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Machine]:
    async with served_machine(qemu, tmp_path_factory.mktemp("idle"), hotplug_ports=4) as running:
        yield running


async def test_a_descriptor_comes_along_with_a_message_of_any_size(machine: Machine, tmp_path: Path) -> None:
    """An earlier call without a descriptor does not get the descriptor."""
    path = make_raw(tmp_path / "disk")

    def add() -> list[Any]:
        with caller(machine) as client, open(path, "r+b") as image:
            plain = json.dumps({"method": f"{INSTANCE}.Describe"}).encode() + b"\0"
            long = {"fileDescriptorIndex": 0, "name": "x" * 100_000}
            message = json.dumps({"method": f"{INSTANCE}.AddStorage", "parameters": long}).encode() + b"\0"
            client.send(plain)
            client.send(message[:7], [image.fileno()])
            client.socket.sendall(message[7:])
            return [client.reply().get("error"), client.reply()["error"]]

    # The error about the disk's name, which is too long, shows that the descriptor was received.
    assert await in_thread(add) == [None, f"{INSTANCE}.BadConfig"]


async def test_a_call_may_come_byte_by_byte_and_several_at_once(machine: Machine) -> None:
    message = json.dumps({"method": f"{INSTANCE}.Describe"}).encode() + b"\0"

    def use() -> list[Any]:
        with caller(machine) as client:
            for byte in message:
                client.send(bytes([byte]))
            seen = [client.reply()]
            client.send(message * 50)
            return seen + [client.reply() for _ in range(50)]

    seen = await in_thread(use)
    assert all(reply["parameters"]["status"] == "running" for reply in seen)


async def test_a_client_that_sends_no_more_still_gets_its_reply(machine: Machine) -> None:
    def use() -> Any:
        with caller(machine) as client:
            client.send(json.dumps({"method": f"{INSTANCE}.Pause"}).encode() + b"\0")
            client.socket.shutdown(socket.SHUT_WR)
            reply = client.reply()
            closed = client.is_closed()
        with caller(machine) as client:
            client.call(f"{INSTANCE}.Resume")
        return reply, closed

    assert await in_thread(use) == ({}, True)


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("io.systemd.MachineInstance.Nothing", "org.varlink.service.MethodNotFound"),
        ("io.systemd.Nothing.Describe", "org.varlink.service.InterfaceNotFound"),
        ("io.systemd.MachineInstance.render_interface_description", "org.varlink.service.InvalidParameter"),
        ("Describe", "org.varlink.service.InvalidParameter"),
        ("", "org.varlink.service.InvalidParameter"),
    ],
)
async def test_unknown_methods_get_the_standards_errors(machine: Machine, method: str, error: str) -> None:
    def use() -> tuple[Any, Any]:
        with caller(machine) as client:
            return client.call(method)["error"], client.call(f"{INSTANCE}.Describe")["parameters"]["status"]

    assert await in_thread(use) == (error, "running")


async def test_oneway_calls_are_not_answered(machine: Machine) -> None:
    def use() -> Any:
        with caller(machine) as client:
            client.send(json.dumps({"method": f"{INSTANCE}.Nothing", "oneway": True}).encode() + b"\0")
            client.send(json.dumps({"method": f"{INSTANCE}.Describe", "oneway": True}).encode() + b"\0")
            return client.call("org.varlink.service.GetInfo")["parameters"]["vendor"]

    assert await in_thread(use) == "vmspawn"


@pytest.mark.parametrize(
    "junk",
    [
        b"\0",
        b"{\0",
        b"null\0",
        b"[]\0",
        b'"text"\0',
        b"\xff\xfe\x00\xd8\0",
        b'{"method":"\xff"}\0',
        b"[" * 100_000 + b"\0",
        b'{"a":' * 20_000 + b"\0",
        b"x" * (limits.MESSAGE_MAX + 1),
    ],
    ids=["nothing", "half", "null", "list", "text", "utf-16", "utf-8", "brackets", "nested", "endless"],
)
async def test_junk_ends_that_connection_and_no_other(machine: Machine, junk: bytes) -> None:
    def use() -> tuple[bool, Any]:
        with caller(machine) as honest, caller(machine) as client:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                client.socket.sendall(junk)
            return client.is_closed(), honest.call(f"{INSTANCE}.Describe")["parameters"]["status"]

    assert await in_thread(use) == (True, "running")


async def test_descriptors_that_come_with_junk_are_closed(machine: Machine, tmp_path: Path) -> None:
    path = make_raw(tmp_path / "disk")

    def use() -> None:
        with open(path, "rb") as image:
            for message in (b"junk\0", b'{"method":"a.B"}\0', b"half a message"):
                for _ in range(20):
                    with caller(machine) as client:
                        client.send(message, [image.fileno()] * 10)

    before = open_files(os.getpid())
    await in_thread(use)
    await in_thread(ping, machine)
    assert open_files(os.getpid()) == before


async def test_a_flood_without_reading_delays_no_other_client(machine: Machine) -> None:
    """Each call is taken when the reply to the last has been sent, so a flood stays in its sender's socket."""
    message = json.dumps({"method": f"{INSTANCE}.Describe"}).encode() + b"\0"

    def use() -> Any:
        with caller(machine) as flood, caller(machine) as honest:
            flood.socket.setblocking(False)
            sent = 0
            while sent < 64 << 20:
                try:
                    sent += flood.socket.send(message * 1000)
                except BlockingIOError:
                    break
            assert sent < 64 << 20
            return honest.call(f"{INSTANCE}.Describe")["parameters"]["status"]

    assert await in_thread(use) == "running"


async def test_a_thousand_connections_leave_room_for_the_next(machine: Machine) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))

    def use() -> tuple[Any, int]:
        clients = [Caller(machine) for _ in range(1000)]
        try:
            status = clients[-1].call(f"{INSTANCE}.Describe")["parameters"]["status"]
            alive = 0
            for client in clients:
                client.socket.setblocking(False)
                try:
                    client.socket.recv(1)
                except BlockingIOError:
                    alive += 1
            return status, alive
        finally:
            for client in clients:
                client.socket.close()

    try:
        assert await in_thread(use) == ("running", CONNECTIONS_MAX)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_the_socket_is_for_its_owner_only(machine: Machine) -> None:
    found = os.stat(machine.directory.file(CONTROL))
    assert stat.S_IMODE(found.st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_another_user_is_refused_even_if_the_modes_of_the_files_allow_it(machine: Machine) -> None:
    path = machine.directory.file(CONTROL)
    folders = [os.path.dirname(path), os.path.dirname(os.path.dirname(path))]
    for folder in folders:
        os.chmod(folder, 0o755)
    os.chmod(path, 0o666)
    script = (
        "import os,socket,sys\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "s=socket.socket(socket.AF_UNIX); s.settimeout(20); s.connect(sys.argv[1])\n"
        "try:\n"
        '    s.sendall(b\'{"method":"io.systemd.MachineInstance.Terminate"}\\0\'); sys.exit(len(s.recv(10)))\n'
        "except OSError: sys.exit(0)\n"
    )
    process = await asyncio.create_subprocess_exec("/usr/bin/python3", "-c", script, path)
    try:
        async with asyncio.timeout(DEADLINE):
            assert await process.wait() == 0
        assert machine.running
    finally:
        for folder in folders:
            os.chmod(folder, 0o700)
        os.chmod(path, 0o600)


async def test_a_subscriber_that_never_reads_is_disconnected_at_its_limit(machine: Machine) -> None:
    """The unread events of a subscriber are limited."""

    def use() -> bool:
        with caller(machine) as silent:
            silent.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            subscribe = {"method": f"{INSTANCE}.SubscribeEvents", "more": True}
            silent.send(json.dumps(subscribe).encode() + b"\0")
            silent.reply()
            # The client must not read before it is disconnected, because it could keep up.
            asyncio.run_coroutine_threadsafe(publish_too_much(), loop).result(DEADLINE)
            while silent.socket.recv(1 << 20):
                pass
            return True

    from vmspawn import Event

    async def publish_too_much() -> None:
        for _ in range(2 * limits.UNSENT_MAX // 100_000):
            machine.monitor.publish(Event("TEST", {"text": "x" * 100_000}))
        while machine.monitor._streams:  # noqa: ASYNC110 - each turn of the loop may bring the end
            await asyncio.sleep(0)

    loop = asyncio.get_running_loop()
    assert await in_thread(use)


async def test_a_subscriber_that_is_gone_is_forgotten_at_once(machine: Machine) -> None:
    def subscribe() -> None:
        with caller(machine) as client:
            client.send(json.dumps({"method": f"{INSTANCE}.SubscribeEvents", "more": True}).encode() + b"\0")
            client.reply()
            assert len(machine.monitor._streams) == 1

    await in_thread(subscribe)
    await in_thread(ping, machine)
    assert len(machine.monitor._streams) == 0

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The control socket, driven by clients that are not ours, honest and otherwise."""

import array
import asyncio
import contextlib
import json
import os
import re
import resource
import socket
import stat
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import varlink

from tests.conftest import make_raw
from tests.machines import Snapshot, detach_by_reset, idle_machine, open_files
from vmspawn import Machine
from vmspawn.control import connection as limits
from vmspawn.control.server import CONNECTIONS_MAX, ControlServer, build_registry
from vmspawn.host.runtime import CONTROL

pytestmark = pytest.mark.asyncio(loop_scope="module")

DEFINITIONS = Path(__file__).parents[1] / "definitions"
INSTANCE = "io.systemd.MachineInstance"
DEADLINE = 20.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def machine(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Machine]:
    async with idle_machine(qemu, tmp_path_factory.mktemp("idle"), hotplug_ports=4) as running:
        server = ControlServer(running.directory, build_registry(running))
        yield running
        server.close()


class Caller:
    """A blocking client of our own making, run in a thread: it can say what no library would."""

    def __init__(self, machine: Machine) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE)
        self.socket.connect(machine.directory.file(CONTROL))
        self.buffer = b""

    def send(self, data: bytes, fds: list[int] | None = None) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds or []))] if fds else []
        self.socket.sendmsg([data], ancillary)

    def reply(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            data = self.socket.recv(65536)
            if not data:
                raise EOFError
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def call(self, method: str, fds: list[int] | None = None, **parameters: Any) -> dict[str, Any]:
        self.send(json.dumps({"method": method, "parameters": parameters}).encode() + b"\0", fds)
        return self.reply()

    def is_closed(self) -> bool:
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True


@contextlib.contextmanager
def caller(machine: Machine) -> Iterator[Caller]:
    client = Caller(machine)
    try:
        yield client
    finally:
        client.socket.close()


def ping(machine: Machine) -> Any:
    with caller(machine) as client:
        return client.call(f"{INSTANCE}.Describe")["parameters"]["status"]


async def in_thread(work: Any, *arguments: Any) -> Any:
    async with asyncio.timeout(60):
        return await asyncio.to_thread(work, *arguments)


def definitions(text: str) -> set[str]:
    """The members of an interface definition, without comments, order and white space."""
    bare = re.sub(r"#.*", "", text)
    parts = re.split(r"(?=\b(?:method|error|type|interface)\s)", bare)
    return {"".join(part.split()) for part in parts if part.strip()}


@pytest.mark.parametrize("name", [INSTANCE, "io.systemd.VirtualMachineInstance"])
async def test_introspection_returns_systemds_definitions(machine: Machine, name: str) -> None:
    def describe() -> str:
        with caller(machine) as client:
            found = client.call("org.varlink.service.GetInterfaceDescription", interface=name)
            return str(found["parameters"]["description"])

    found = definitions(await in_thread(describe))
    expected = definitions((DEFINITIONS / f"{name}.varlink").read_text())
    # Members that later issues bring are not promised before they work.
    missing = {part for part in expected - found if not part.startswith("methodReplaceStorage")}
    assert (missing, found - expected) == (set(), set())


async def test_the_reference_client_can_introspect_and_call(machine: Machine) -> None:
    def use() -> tuple[list[str], dict[str, Any]]:
        with varlink.Client(address=f"unix:{machine.directory.file(CONTROL)}") as client:
            with client.open("org.varlink.service") as service:
                interfaces = service.GetInfo()["interfaces"]
            for name in interfaces:
                client.get_interface(name)
            with client.open(INSTANCE) as instance:
                return interfaces, instance.Describe()

    interfaces, described = await in_thread(use)
    assert {INSTANCE, "io.systemd.VirtualMachineInstance", "io.vmspawn.Machine", "org.varlink.service"} <= set(
        interfaces
    )
    assert described == {"running": True, "status": "running"}


async def test_the_reference_client_gets_typed_errors(machine: Machine) -> None:
    def use() -> str:
        with (
            varlink.Client(address=f"unix:{machine.directory.file(CONTROL)}") as client,
            client.open(INSTANCE) as instance,
            pytest.raises(varlink.VarlinkError) as caught,
        ):
            instance.RemoveStorage("nobody")
        return str(caught.value.error())

    assert await in_thread(use) == f"{INSTANCE}.NoSuchStorage"


async def test_pause_and_resume_change_what_describe_says(machine: Machine) -> None:
    def use() -> list[tuple[str, bool]]:
        seen = []
        with caller(machine) as client:
            for method in ("Pause", "Resume"):
                assert client.call(f"{INSTANCE}.{method}") == {}
                found = client.call(f"{INSTANCE}.Describe")["parameters"]
                seen.append((found["status"], found["running"]))
        return seen

    assert await in_thread(use) == [("paused", False), ("running", True)]


async def test_events_begin_with_ready_and_keep_to_the_filter(machine: Machine) -> None:
    def use() -> list[str]:
        with caller(machine) as watcher, caller(machine) as actor:
            subscribe = {"method": f"{INSTANCE}.SubscribeEvents", "parameters": {"filter": ["STOP"]}, "more": True}
            watcher.send(json.dumps(subscribe).encode() + b"\0")
            seen = [watcher.reply()]
            for method in ("Pause", "Resume", "Pause", "Resume"):
                actor.call(f"{INSTANCE}.{method}")
            seen += [watcher.reply(), watcher.reply()]
            assert all(reply["continues"] for reply in seen)
            return [reply["parameters"]["event"] for reply in seen]

    assert await in_thread(use) == ["READY", "STOP", "STOP"]


async def test_subscribing_without_more_is_refused(machine: Machine) -> None:
    def use() -> Any:
        with caller(machine) as client:
            return client.call(f"{INSTANCE}.SubscribeEvents")["error"]

    assert await in_thread(use) == "org.varlink.service.ExpectedMore"


@pytest.mark.parametrize("config", [None, "virtio-blk", "nvme", "virtio-scsi", "scsi-cd"])
async def test_add_storage_takes_a_descriptor(machine: Machine, tmp_path: Path, config: str | None) -> None:
    path = make_raw(tmp_path / "disk")
    before = await Snapshot.take(machine)

    def add() -> dict[str, Any]:
        with caller(machine) as client, open(path, "r+b") as image:
            parameters = {"fileDescriptorIndex": 0, "name": "pool:disk"} | ({"config": config} if config else {})
            return client.call(f"{INSTANCE}.AddStorage", [image.fileno()], **parameters)

    needs_guest = config not in ("virtio-scsi", "scsi-cd")

    def remove() -> dict[str, Any]:
        timeout = 100_000 if needs_guest else 20_000_000
        with caller(machine) as client:
            return client.call("io.vmspawn.Machine.DetachStorage", name="pool:disk", timeoutUSec=timeout)

    assert await in_thread(add) == {}
    assert [each.drive.bus for each in machine.storage if not each.boot] == [config or "virtio-blk"]
    removed = await in_thread(remove)
    if not needs_guest:
        assert removed == {"parameters": {"pending": False}}
    elif "error" in removed:
        # The firmware lets go of a PCI device when it is reset; the answer came in time all the same.
        assert removed["error"] == "io.vmspawn.Machine.StoragePending"
        await detach_by_reset(machine, "pool:disk")
    assert await Snapshot.take(machine) == before


def flags(path: Path, name: str) -> tuple[int, str]:
    return {
        "O_PATH": (os.O_PATH, "BadConfig"),
        "write-only": (os.O_WRONLY, "BadConfig"),
        "O_SYNC": (os.O_RDWR | os.O_SYNC, "BadConfig"),
    }[name]


@pytest.mark.parametrize("kind", ["O_PATH", "write-only", "O_SYNC", "pipe"])
async def test_add_storage_refuses_descriptors_that_make_no_drive(machine: Machine, tmp_path: Path, kind: str) -> None:
    path = make_raw(tmp_path / "disk")

    def add() -> Any:
        fds = list(os.pipe()) if kind == "pipe" else [os.open(path, flags(path, kind)[0])]
        try:
            with caller(machine) as client:
                return client.call(f"{INSTANCE}.AddStorage", fds[:1], fileDescriptorIndex=0, name="disk")["error"]
        finally:
            for fd in fds:
                os.close(fd)

    before = await Snapshot.take(machine)
    assert await in_thread(add) == f"{INSTANCE}.BadConfig"
    assert await Snapshot.take(machine) == before


@pytest.mark.parametrize(
    ("parameters", "with_fd", "error"),
    [
        ({"fileDescriptorIndex": 0, "name": "disk", "config": "floppy"}, True, f"{INSTANCE}.BadConfig"),
        ({"fileDescriptorIndex": 0, "name": ""}, True, f"{INSTANCE}.BadConfig"),
        ({"fileDescriptorIndex": 1, "name": "disk"}, True, "org.varlink.service.InvalidParameter"),
        ({"fileDescriptorIndex": -1, "name": "disk"}, True, "org.varlink.service.InvalidParameter"),
        ({"fileDescriptorIndex": 0, "name": "disk"}, False, "org.varlink.service.InvalidParameter"),
        ({"fileDescriptorIndex": 0}, True, "org.varlink.service.InvalidParameter"),
        ({"fileDescriptorIndex": 0, "name": 7}, True, "org.varlink.service.InvalidParameter"),
        ({"fileDescriptorIndex": 0, "name": "disk", "more": 1}, True, "org.varlink.service.InvalidParameter"),
    ],
)
async def test_add_storage_refuses_bad_parameters(
    machine: Machine, tmp_path: Path, parameters: dict[str, Any], with_fd: bool, error: str
) -> None:
    path = make_raw(tmp_path / "disk")

    def add() -> Any:
        with caller(machine) as client, open(path, "r+b") as image:
            fds = [image.fileno()] if with_fd else None
            return client.call(f"{INSTANCE}.AddStorage", fds, **parameters)["error"]

    before = await Snapshot.take(machine)
    assert await in_thread(add) == error
    assert await Snapshot.take(machine) == before


async def test_a_descriptor_comes_along_with_a_message_of_any_size(machine: Machine, tmp_path: Path) -> None:
    """And a call without one that was sent just before does not get it."""
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

    # The name is too long for a drive, which says that the descriptor was there.
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


async def test_a_flood_without_reading_holds_nobody_up(machine: Machine) -> None:
    """Calls are taken one by one as their replies leave, so a flood stays in its sender's socket."""
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
async def test_another_user_is_turned_away_even_where_the_files_let_it_in(machine: Machine) -> None:
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


async def test_a_subscriber_that_never_reads_is_let_go_at_its_bound(machine: Machine) -> None:
    """Nothing it leaves unread grows without end, and a subscriber that reads is not disturbed."""

    def use() -> bool:
        with caller(machine) as silent:
            silent.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            subscribe = {"method": f"{INSTANCE}.SubscribeEvents", "more": True}
            silent.send(json.dumps(subscribe).encode() + b"\0")
            silent.reply()
            # It must not read before it is cut off: it could keep up otherwise.
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

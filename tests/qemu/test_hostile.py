# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that the replies to a valid client are right, and that nothing is left, whatever other clients send."""

import contextlib
import itertools
import json
import os
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import hostile
from tests.commands import Spawned, idle, vmctl
from tests.conftest import make_raw
from tests.figures import figure
from tests.machines import links_of, open_files
from tests.qemu.qmp_fixtures import SCALE, scaled
from vmspawn.control.client import Client
from vmspawn.host import runtime
from vmspawn.host.limits import DESCRIPTORS
from vmspawn.qmp.limits import SESSIONS

#: Messages of one connection. They are few, because an invalid message ends its connection.
BATCH = 4

#: Seconds for the removal of all that a hostile client has left.
DEADLINE = 60.0


class Honest:
    """A client that asks questions with known answers."""

    def __init__(self, machine: Spawned) -> None:
        self.machine = machine
        self.varlink = Client(machine.name)
        self._upgraded = Client(machine.name)
        self._qmp, received = self._upgraded.upgrade("io.vmspawn.Machine.AcquireQMP")
        self._lines = self._qmp.makefile("rb")
        while not received.endswith(b"\n"):
            received += self._lines.readline()
        self._numbers = itertools.count()
        self._execute("qmp_capabilities")

    def _execute(self, command: str) -> Any:
        number = next(self._numbers)
        self._qmp.sendall(json.dumps({"execute": command, "id": number}).encode())
        while "event" in (reply := json.loads(self._lines.readline())):
            pass
        assert reply["id"] == number
        return reply["return"]

    def ask(self) -> None:
        """Check the replies of both protocols."""
        found = self.varlink.call("io.vmspawn.Machine.Describe")
        assert (found["name"], found["status"]) == (self.machine.name, "running")
        assert [disk["name"] for disk in self.disks()][:2] == ["boot", "honest"]
        assert self._execute("query-status")["status"] == "running"

    def disks(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.varlink.call("io.vmspawn.Machine.ListStorage")["storage"]
        return found

    def close(self) -> None:
        self._lines.close()
        self.varlink.close()
        self._upgraded.close()


@pytest.fixture(scope="module")
def honest(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Honest]:
    folder = tmp_path_factory.mktemp("hostile")
    with idle(qemu, folder) as machine:
        done = vmctl("attach-disk", machine.name, str(make_raw(folder / "honest")), "--bus=virtio-scsi")
        assert done.returncode == 0, done.stderr
        client = Honest(machine)
        yield client
        client.close()


@contextlib.contextmanager
def nothing_left(honest: Honest) -> Iterator[None]:
    """Check that the manager has as many descriptors afterwards as before, and no disk of hostile clients."""
    pid = honest.machine.process.pid
    before = open_files(pid)
    yield
    # Some clients wait for the firmware to release a disk, for as long as they wish. A reset releases it.
    honest.varlink.call("io.systemd.MachineInstance.Reboot")
    deadline = time.monotonic() + DEADLINE
    while open_files(pid) != before or honest.varlink.call("io.vmspawn.Machine.ListSessions")["sessions"][1:]:
        honest.ask()
        assert time.monotonic() < deadline, f"{sorted(links_of(pid))}, {before} before"
    for disk in honest.disks()[2:]:
        honest.varlink.call("io.vmspawn.Machine.DetachStorage", {"name": disk["name"]})


def stranger(honest: Honest, protocol: str) -> socket.socket:
    connected = socket.socket(socket.AF_UNIX)
    connected.settimeout(DEADLINE)
    connected.connect(os.path.join(runtime.runtime_root(), honest.machine.name, runtime.CONTROL))
    if protocol == "qmp":
        connected.sendall(b'{"method":"io.vmspawn.Machine.AcquireQMP","upgrade":true}\0')
        connected.recv(65536)
    return connected


def send(connected: socket.socket, data: bytes, fds: list[int]) -> None:
    """Send as much as is accepted. A disconnect is not an error."""
    connected.setblocking(False)
    with contextlib.suppress(OSError):
        while data:
            sent = socket.send_fds(connected, [data], fds) if fds else connected.send(data)
            data, fds = data[sent:], []
    with contextlib.suppress(OSError):
        connected.recv(1 << 16)


def storm(honest: Honest, protocol: str, choices: random.Random, messages: int, fd: int) -> None:
    for _ in range(max(1, messages // BATCH)):
        connected = stranger(honest, protocol)
        for _ in range(BATCH):
            data = hostile.MAKERS[protocol](choices)
            send(connected, data, [fd] if choices.random() < 0.1 else [])
        if choices.random() < 0.5:
            with contextlib.suppress(OSError):
                connected.shutdown(socket.SHUT_WR)
        honest.ask()
        connected.close()


@pytest.mark.scaled
@pytest.mark.parametrize("protocol", ["varlink", "qmp"])
def test_a_storm_of_messages_does_not_affect_a_valid_client(honest: Honest, tmp_path: Path, protocol: str) -> None:
    """There are 2,000 messages of each protocol in a usual run, and 20,000 in `./dev soak`."""
    seed = random.randrange(1 << 32) if SCALE > 1 else 8
    fd = os.open(make_raw(tmp_path / "hostile", 1 << 20), os.O_RDONLY)
    try:
        with nothing_left(honest):
            storm(honest, protocol, random.Random(seed), scaled(2000), fd)
        figure(f"hostile messages, {protocol}, beside an honest client", scaled(2000))
    finally:
        os.close(fd)


@pytest.mark.scaled
def test_any_bytes_in_any_pieces_do_not_affect_a_valid_client(honest: Honest) -> None:
    junk = st.lists(
        st.one_of(
            st.binary(max_size=64),
            st.sampled_from(
                [b"\0", b"{}\0", b'{"method":', b"[" * 100, b"\xff\xfe", b'{"method":"a.B"}\0', b"\0" * 50]
            ),
            st.randoms(use_true_random=False).map(hostile.call),
        ),
        max_size=12,
    )

    @settings(max_examples=scaled(150), derandomize=SCALE == 1, suppress_health_check=list(HealthCheck))
    @given(junk)
    def run(pieces: list[bytes]) -> None:
        with stranger(honest, "varlink") as connected:
            for piece in pieces:
                send(connected, piece, [])
            honest.ask()

    with nothing_left(honest):
        run()


def test_the_number_of_sessions_is_limited(honest: Honest) -> None:
    """One session more than the limit is refused with the reason; the others continue."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard < DESCRIPTORS:
        pytest.skip("this user may not have so many descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    clients: list[socket.socket] = []
    with nothing_left(honest):
        try:
            for _ in range(SESSIONS - 1):
                clients.append(stranger(honest, "qmp"))
            refused = socket.socket(socket.AF_UNIX)
            clients.append(refused)
            refused.settimeout(DEADLINE)
            refused.connect(os.path.join(runtime.runtime_root(), honest.machine.name, runtime.CONTROL))
            refused.sendall(b'{"method":"io.vmspawn.Machine.AcquireQMP"}\0')
            assert f"cannot open more than {SESSIONS} QMP sessions".encode() in refused.recv(65536)
            honest.ask()
        finally:
            for client in clients:
                client.close()

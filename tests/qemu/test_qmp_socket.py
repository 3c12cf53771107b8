# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests `vmctl qmp-socket`, which serves QMP sessions at a path, for programs that only accept a path."""

import json
import os
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.commands import VMCTL, Spawned, idle, vmctl
from tests.qemu.qmp_fixtures import Client
from vmspawn.host import runtime

DEADLINE = 60.0


@pytest.fixture
def machine(qemu: str, tmp_path: Path) -> Iterator[Spawned]:
    with idle(qemu, tmp_path) as running:
        yield running


@contextmanager
def serving(machine: str, listen: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Run `vmctl qmp-socket`."""
    command = [*VMCTL, "qmp-socket", machine, str(listen), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert "serving QMP" in process.stderr.readline()
            yield process
        finally:
            process.terminate()


def client(path: Path) -> Client:
    connected = socket.socket(socket.AF_UNIX)
    connected.settimeout(DEADLINE)
    connected.connect(str(path))
    return Client(connected).negotiate()


def test_each_client_has_a_session_of_its_own(machine: Spawned, tmp_path: Path) -> None:
    path = tmp_path / "demo.sock"
    with serving(machine.name, path) as process:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with closing(client(path)) as one, closing(client(path)) as other:
            assert one.run("query-name") == {"return": {"name": machine.name}}
            assert other.run("query-status")["return"]["status"] == "running"
            sessions = json.loads(vmctl("list-sessions", machine.name, "--json=short").stdout)
            assert len(sessions) == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE) == 0
    assert not path.exists()


def test_descriptors_are_passed_on(machine: Spawned, tmp_path: Path) -> None:
    path = tmp_path / "demo.sock"
    with serving(machine.name, path), socket.socket(socket.AF_UNIX) as connected:
        connected.settimeout(DEADLINE)
        connected.connect(str(path))
        stream = connected.makefile("rb")
        stream.readline()
        connected.sendall(b'{"execute":"qmp_capabilities"}')
        assert json.loads(stream.readline()) == {"return": {}}
        fd = os.open("/dev/null", os.O_RDWR)
        command = b'{"execute":"add-fd","arguments":{"fdset-id":77}}'
        socket.send_fds(connected, [command], [fd])
        os.close(fd)
        assert json.loads(stream.readline())["return"]["fdset-id"] == 77
        connected.sendall(b'{"execute":"remove-fd","arguments":{"fdset-id":77}}')
        assert json.loads(stream.readline()) == {"return": {}}


def test_read_only_sessions_change_nothing(machine: Spawned, tmp_path: Path) -> None:
    path = tmp_path / "demo.sock"
    with serving(machine.name, path, "--read-only"), closing(client(path)) as reader:
        assert "read-only" in reader.run("stop")["error"]["desc"]
        assert reader.run("query-status")["return"]["status"] == "running"


def test_the_server_ends_with_the_machine(machine: Spawned, tmp_path: Path) -> None:
    path = tmp_path / "demo.sock"
    with serving(machine.name, path) as process, closing(client(path)):
        vmctl("terminate", machine.name)
        assert process.wait(DEADLINE) == 0
    assert not path.exists()


def test_a_socket_that_cannot_be_served_is_reported(machine: Spawned, tmp_path: Path) -> None:
    done = vmctl("qmp-socket", "nobody", str(tmp_path / "sock"))
    assert (done.returncode, "there is no machine named nobody" in done.stderr) == (1, True)
    (tmp_path / "taken").touch()
    done = vmctl("qmp-socket", machine.name, str(tmp_path / "taken"))
    assert (done.returncode, "Address already in use" in done.stderr) == (1, True)
    ours = Path(runtime.runtime_root()) / machine.name / runtime.MONITORS[0]
    done = vmctl("qmp-share", str(ours), str(tmp_path / "sock"))
    assert done.returncode == 2
    assert f"belongs to the manager of machine {machine.name}" in done.stderr
    assert f"vmctl qmp-socket {machine.name} SOCKET" in done.stderr

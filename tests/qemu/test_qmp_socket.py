# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests `vmctl qmp-socket`, which serves QMP sessions at a path, for programs that only accept a path."""

import json
import signal
import stat
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.commands import DEADLINE, VMCTL, Spawned, idle, vmctl
from tests.qemu.qmp_fixtures import Client
from vmspawn.host import runtime


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


def test_each_client_has_a_session_of_its_own(machine: Spawned, tmp_path: Path) -> None:
    path = tmp_path / "demo.sock"
    with serving(machine.name, path) as process:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with closing(Client.connect(path)) as one, closing(Client.connect(path)) as other:
            assert one.run("query-name") == {"return": {"name": machine.name}}
            assert other.run("query-status")["return"]["status"] == "running"
            sessions = json.loads(vmctl("list-sessions", machine.name, "--json=short").stdout)
            assert len(sessions) == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE) == 0
    assert not path.exists()


def test_descriptors_are_passed_on(machine: Spawned, tmp_path: Path) -> None:
    path = tmp_path / "demo.sock"
    with serving(machine.name, path), closing(Client.connect(path)) as sender:
        with open("/dev/null", "r+b") as null:
            assert sender.run("add-fd", fds=[null.fileno()], fdset_id=77)["return"]["fdset-id"] == 77
        assert sender.run("remove-fd", fdset_id=77) == {"return": {}}


def test_read_only_sessions_change_nothing(machine: Spawned, tmp_path: Path) -> None:
    path = tmp_path / "demo.sock"
    with serving(machine.name, path, "--read-only"), closing(Client.connect(path)) as reader:
        assert "read-only" in reader.run("stop")["error"]["desc"]
        assert reader.run("query-status")["return"]["status"] == "running"


def test_the_server_ends_with_the_machine(machine: Spawned, tmp_path: Path) -> None:
    path = tmp_path / "demo.sock"
    with serving(machine.name, path) as process, closing(Client.connect(path)):
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

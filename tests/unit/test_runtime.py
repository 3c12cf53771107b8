# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the runtime directory: one living manager for each name, and the removal of a dead manager's files."""

import json
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmspawn.control.client import connect
from vmspawn.errors import NotConnected, StartError
from vmspawn.host import runtime
from vmspawn.host.runtime import MachineDirectory


@pytest.fixture
def name() -> str:
    return f"t{uuid.uuid4().hex[:8]}"


@pytest.fixture
def directory(name: str) -> Iterator[MachineDirectory]:
    created = MachineDirectory.create(name)
    yield created
    created.remove()


def test_the_directory_is_for_its_owner_only(directory: MachineDirectory) -> None:
    assert stat.S_IMODE(os.stat(directory.path).st_mode) == 0o700


def test_a_name_cannot_be_used_twice_at_once(directory: MachineDirectory) -> None:
    with pytest.raises(StartError, match="is already running") as caught:
        MachineDirectory.create(directory.name)
    assert "another name with name=" in caught.value.hint


def test_the_name_is_free_again_after_removal(name: str) -> None:
    for _ in range(2):
        MachineDirectory.create(name).remove()
    assert not os.path.exists(os.path.join(runtime.runtime_root(), name))


def test_leftovers_of_a_dead_manager_are_cleaned(name: str) -> None:
    dead = MachineDirectory.create(name)
    Path(dead.file(runtime.STATE)).write_text(json.dumps({"qemu": {"pid": os.getpid(), "started": 1}}))
    Path(dead.file(runtime.CONTROL)).touch()
    dead.close()
    again = MachineDirectory.create(name)
    assert os.listdir(again.path) == []
    again.remove()


def test_a_qemu_that_outlived_its_manager_keeps_the_name(name: str) -> None:
    dead = MachineDirectory.create(name)
    state = {"qemu": {"pid": os.getpid(), "started": runtime.start_time(os.getpid())}}
    dead.write(runtime.STATE, json.dumps(state).encode())
    dead.close()
    with pytest.raises(StartError, match=f"QEMU is process {os.getpid()}"):
        MachineDirectory.create(name)
    os.unlink(os.path.join(dead.path, runtime.STATE))
    MachineDirectory.create(name).remove()


def test_a_symbolic_link_is_not_a_machine(name: str, tmp_path: Path) -> None:
    os.makedirs(runtime.runtime_root(), exist_ok=True)
    link = os.path.join(runtime.runtime_root(), name)
    os.symlink(tmp_path, link)
    with pytest.raises(StartError, match="cannot use the runtime directory"):
        MachineDirectory.create(name)
    os.unlink(link)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_directory_of_another_user_is_refused(name: str) -> None:
    path = os.path.join(runtime.runtime_root(), name)
    os.makedirs(path)
    os.chown(path, 65534, 65534)
    with pytest.raises(StartError, match="belongs to another user"):
        MachineDirectory.create(name)
    os.rmdir(path)


def test_writing_replaces_the_whole_file(directory: MachineDirectory) -> None:
    for content in (b"long content", b"short"):
        directory.write(runtime.STATE, content)
        assert Path(directory.file(runtime.STATE)).read_bytes() == content
    assert os.listdir(directory.path) == [runtime.STATE]


def test_a_client_waits_in_the_queue_of_the_control_socket(directory: MachineDirectory) -> None:
    directory.listen()
    with connect(directory.name, runtime.CONTROL) as client, directory.take_listener() as listener:
        accepted, _ = listener.accept()
        with accepted:
            accepted.sendall(b"served")
        assert client.recv(16) == b"served"


def test_clients_of_a_manager_that_serves_none_are_disconnected(directory: MachineDirectory) -> None:
    directory.listen()
    with connect(directory.name, runtime.CONTROL) as client:
        directory.refuse()
        with pytest.raises(ConnectionResetError):
            client.recv(16)
    with pytest.raises(NotConnected):
        connect(directory.name, runtime.CONTROL)
    assert os.listdir(directory.path) == []


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (None, True),
        ({}, True),
        ({"qemu": {"pid": 0}}, True),
        ({"qemu": {"pid": 1}, "loading": {"uri": "file:x"}}, True),
        ({"qemu": {"pid": 1}, "loading": None}, False),
        ({"qemu": {"pid": 1}}, False),
    ],
)
def test_a_machine_starts_until_it_has_a_qemu_and_its_state(
    directory: MachineDirectory, state: dict[str, object] | None, expected: bool
) -> None:
    if state is not None:
        directory.write(runtime.STATE, json.dumps(state).encode())
    assert runtime.is_starting(directory.path) is expected


def test_the_environment_names_the_runtime_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMSPAWN_RUNTIME_DIR", "/somewhere")
    assert runtime.runtime_root() == "/somewhere"

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests replies of Varlink services: their descriptors, and replies that violate the protocol."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmspawn.errors import ProtocolError, VolumeError
from vmspawn.host.storageprovider import Volume, acquire
from vmspawn.host.varlink import Client

DEADLINE = 10.0


@pytest.fixture
def connection() -> Iterator[tuple[Client, socket.socket]]:
    """Yield a client, and the socket of its service."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(DEADLINE)
    with theirs, Client(ours, "service", timeout=DEADLINE) as client:
        yield client, theirs


def open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def pipes(count: int) -> Iterator[list[tuple[int, int]]]:
    """Yield pipes: their ends for reading and for writing."""
    found = [os.pipe() for _ in range(count)]
    try:
        yield found
    finally:
        for each in found:
            os.close(each[0])
            os.close(each[1])


def check_pipe(client: Client, index: int, pipe: tuple[int, int]) -> None:
    """Check that the last reply's descriptor at `index` writes to a pipe, and close it."""
    fd = client.take_descriptor(index)
    assert os.fstat(fd).st_ino == os.fstat(pipe[0]).st_ino
    os.close(fd)


def test_an_index_refers_to_the_descriptors_of_the_last_reply(connection: tuple[Client, socket.socket]) -> None:
    client, service = connection
    before = open_files()
    with pipes(4) as made:
        service.sendall(b'{"continues":true}\0')
        socket.send_fds(service, [b'{"continues":true}\0'], [made[0][1], made[1][1]])
        socket.send_fds(service, [b'{"contin'], [made[2][1], made[3][1]])
        service.sendall(b'ues":true}\0{}\0')
        replies = client.stream("a.b", forever=False)
        next(replies)
        with pytest.raises(ProtocolError, match="descriptor 0, but has not sent it"):
            client.take_descriptor(0)
        next(replies)
        check_pipe(client, 0, made[0])
        with pytest.raises(ProtocolError, match="descriptor 0, but has not sent it"):
            client.take_descriptor(0)
        next(replies)
        check_pipe(client, 0, made[2])
        check_pipe(client, 1, made[3])
        next(replies)
        with pytest.raises(ProtocolError, match="descriptor 1, but has not sent it"):
            client.take_descriptor(1)
    assert open_files() == before


def test_a_client_closes_descriptors_that_were_not_taken(connection: tuple[Client, socket.socket]) -> None:
    client, service = connection
    before = open_files()
    with pipes(2) as made:
        socket.send_fds(service, [b"{}\0{}\0"], [made[0][1]])
        socket.send_fds(service, [b"{}\0"], [made[1][1]])
        assert client.call("a.b") == {}
        assert client.call("a.b") == {}
        client.close()
    assert len(before - open_files()) == 1


REPLIES = [
    (b"{}", "without the index of a descriptor"),
    (b'{"parameters":{"fileDescriptorIndex":null}}', "without the index of a descriptor"),
    (b'{"parameters":{"fileDescriptorIndex":"zero"}}', "without the index of a descriptor"),
    (b'{"parameters":{"fileDescriptorIndex":true}}', "without the index of a descriptor"),
    (b'{"parameters":{"fileDescriptorIndex":0.5}}', "without the index of a descriptor"),
    (b'{"parameters":{"fileDescriptorIndex":1}}', "refers to descriptor 1, but has not sent it"),
    (b'{"parameters":{"fileDescriptorIndex":-1}}', "refers to descriptor -1, but has not sent it"),
    (b'{"parameters":[0]}', "not Varlink"),
    (b"[]", "not Varlink"),
    (b"{", "not Varlink"),
    (b"[" * 100_000, "not Varlink"),
    (b'{"error":7}', "not Varlink"),
    (b'{"error":"a.B","parameters":[0]}', "not Varlink"),
    (b'{"error":"a.B","parameters":{"hint":7}}', "not Varlink"),
    (b'{"error":"a.B","parameters":{"template":{"hint":""}}}', "not Varlink"),
    (b'{"error":"io.systemd.System","parameters":{"errno":99999999999}}', "not Varlink"),
]


@pytest.mark.parametrize(("reply", "reason"), REPLIES)
def test_a_storage_provider_that_violates_the_protocol_is_named(
    reply: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _provider(reply, monkeypatch), pytest.raises(VolumeError, match=reason) as caught:
        acquire(Volume("fs", "data", "", {}), user=True, read_only=False)
    assert str(caught.value).startswith("cannot get the volume fs:data: ")


def test_a_volume_is_the_descriptor_of_the_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    with _provider(b'{"parameters":{"fileDescriptorIndex":0}}', monkeypatch) as folder:
        fd = acquire(Volume("fs", "data", "", {}), user=True, read_only=False)
        assert os.path.samestat(os.fstat(fd), os.stat(folder))
        os.close(fd)


@contextlib.contextmanager
def _provider(reply: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run a storage provider that answers one call. Yields the directory whose descriptor it sends."""
    # The path of tmp_path may be too long for a socket's address.
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        path = Path(folder, "systemd/io.systemd.StorageProvider/fs")
        path.parent.mkdir(parents=True)
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(DEADLINE)
        thread = threading.Thread(target=_answer, args=(listener, reply, folder))
        thread.start()
        try:
            yield folder
        finally:
            thread.join()


def _answer(listener: socket.socket, reply: bytes, folder: str) -> None:
    connected, _ = listener.accept()
    fd = os.open(folder, os.O_RDONLY)
    with connected:
        connected.settimeout(DEADLINE)
        while not connected.recv(65536).endswith(b"\0"):
            pass
        socket.send_fds(connected, [reply + b"\0"], [fd])
    os.close(fd)

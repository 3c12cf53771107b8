# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests passed descriptors, and clients that disconnect, on a native monitor and on a session alike.

The sources are QEMU's monitor/fds.c, chardev/char-socket.c and monitor/qmp.c.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.qemu.qmp_fixtures import NEGOTIATE, Client, Machine, Server, Side, wait_until

Shared = tuple[Machine, Server]

ADD = b'{"execute":"add-fd","id":%d}'


@pytest.fixture(autouse=True)
def nothing_left(both: Shared) -> Iterator[None]:
    """Check that a test leaves no descriptor open in QEMU or in this process, once its clients have disconnected."""
    machine, server = both
    with Side("session", *both) as sessions:
        # QEMU 7.2 removes descriptor sets only while the machine runs.
        sessions.open().run("cont")
    wait_until(lambda: not server.sessions(), "the end of earlier sessions")
    before = machine.descriptors(), len(os.listdir("/proc/self/fd"))
    yield
    wait_until(lambda: (machine.descriptors(), len(os.listdir("/proc/self/fd"))) == before, "the descriptors' closing")


@pytest.fixture
def files(tmp_path: Path) -> Iterator[list[int]]:
    """Open files that can be distinguished."""
    opened = [os.open(tmp_path / f"file{number}", os.O_RDWR | os.O_CREAT) for number in range(8)]
    yield opened
    for fd in opened:
        os.close(fd)


def added(client: Client, machine: Machine) -> tuple[os.stat_result, int]:
    """Read the reply to an add-fd; returns the status of the file that QEMU took, and the number of its set."""
    result = client.message()["return"]
    return os.stat(f"/proc/{machine.process.pid}/fd/{result['fd']}"), result["fdset-id"]


def check_taken(client: Client, machine: Machine, fd: int) -> None:
    """Read the reply to an add-fd, check that QEMU took this file, and remove its set."""
    found, fdset = added(client, machine)
    assert os.path.samestat(found, os.fstat(fd))
    assert client.run("remove-fd", fdset_id=fdset) == {"return": {}}


def test_pipelined_commands_each_get_their_own_descriptor(side: Side, files: list[int]) -> None:
    client = side.open()
    for number, fd in enumerate(files):
        client.send(ADD % number, [fd])
    found = [added(client, side.machine) for _ in files]
    for fd, (taken, fdset) in zip(files, found, strict=True):
        assert os.path.samestat(taken, os.fstat(fd))
        assert client.run("remove-fd", fdset_id=fdset) == {"return": {}}


@pytest.mark.parametrize("cut", [1, len(ADD) // 2, len(ADD % 0) - 1])
def test_a_descriptor_may_come_with_any_byte_of_its_command(side: Side, files: list[int], cut: int) -> None:
    client = side.open()
    client.send((ADD % 0)[:cut])
    client.send((ADD % 0)[cut:], files[:1])
    check_taken(client, side.machine, files[0])


def test_a_descriptor_waits_and_is_replaced_by_a_later_one(side: Side, files: list[int]) -> None:
    client = side.open()
    assert "return" in client.run("query-status", fds=files[:1])
    assert "return" in client.run("query-status")
    client.send(ADD % 0)
    check_taken(client, side.machine, files[0])
    assert "return" in client.run("query-status", fds=files[1:2])
    assert "return" in client.run("query-status", fds=files[2:3])
    client.send(ADD % 0)
    check_taken(client, side.machine, files[2])
    assert client.run("add-fd")["error"]["desc"] == "No file descriptor supplied via SCM_RIGHTS"


def test_of_several_descriptors_the_first_is_taken(side: Side, files: list[int]) -> None:
    client = side.open()
    client.send(ADD % 0, files)
    check_taken(client, side.machine, files[0])
    assert client.run("add-fd")["error"]["desc"] == "No file descriptor supplied via SCM_RIGHTS"


def test_a_command_that_fails_leaves_the_descriptor_for_the_next(side: Side, files: list[int]) -> None:
    """QEMU checks the arguments before it looks for the descriptor."""
    client = side.open()
    assert client.run("add-fd", fds=files[:1], nope=1)["error"]["desc"] == "Parameter 'nope' is unexpected"
    client.send(ADD % 0)
    check_taken(client, side.machine, files[0])


def test_a_name_is_known_to_its_own_monitor_alone(side: Side, files: list[int]) -> None:
    first, second = side.open(), side.open()
    assert first.run("getfd", fds=files[:1], fdname="x") == {"return": {}}
    refused = {"class": "GenericError", "desc": "File descriptor named 'x' not found"}
    assert second.run("closefd", fdname="x")["error"] == refused
    # A name that is used again stands for the later file.
    assert first.run("getfd", fds=files[1:2], fdname="x") == {"return": {}}
    assert first.run("closefd", fdname="x") == {"return": {}}
    assert first.run("closefd", fdname="x")["error"] == refused


def test_a_set_is_known_to_all_monitors(side: Side, files: list[int]) -> None:
    first, second = side.open(), side.open()
    reply = first.run("add-fd", fds=files[:1], opaque="mine")["return"]
    assert second.run("query-fdsets") == {
        "return": [{"fdset-id": reply["fdset-id"], "fds": [{"fd": reply["fd"], "opaque": "mine"}]}]
    }
    assert second.run("remove-fd", fdset_id=reply["fdset-id"]) == {"return": {}}


# Clients that disconnect.


def test_the_first_commands_of_a_disconnected_client_run(side: Side) -> None:
    """QEMU runs the first commands in order, and drops the queued ones at the disconnect."""
    client, other = side.open(), side.open()
    nodes = [f"node{number}" for number in range(40)]
    for node in nodes:
        arguments: dict[str, object] = {"driver": "null-co", "node-name": node}
        client.send(json.dumps({"execute": "blockdev-add", "arguments": arguments}).encode())
        # QEMU needs milliseconds for this command, so that the disconnect comes before the last commands.
        arguments = {"val": 0, "size": 16 << 20, "filename": os.devnull}
        client.send(json.dumps({"execute": "pmemsave", "arguments": arguments}).encode())
    while client.message() != {"return": {}}:
        pass
    client.close()
    there = wait_for_rest(other)
    assert there
    assert there == set(nodes[: len(there)])
    assert len(there) < len(nodes)
    for node in there:
        assert other.run("blockdev-del", node_name=node) == {"return": {}}


def wait_for_rest(client: Client) -> set[str]:
    """Wait until no further nodes appear; returns the names of all nodes.

    QEMU serves its monitors in turn, so that another client's queued command would run before the second reply.
    """
    replies: list[set[str]] = []
    while len(replies) < 10 or replies[-10] != replies[-1]:
        replies.append({node["node-name"] for node in client.run("query-named-block-nodes")["return"]})
    return replies[-1]


def test_the_next_client_of_a_monitor_begins_afresh(both: Shared) -> None:
    """A client's incomplete command, enabled capability and passed descriptor do not affect the next client."""
    machine, server = both
    with tempfile.TemporaryFile() as file:
        ways: tuple[Callable[[], Client], ...] = (lambda: machine.native(2), server.open)
        for connect in ways:
            first = connect().negotiate(oob=True)
            first.run("query-status", fds=[file.fileno()])
            first.send(b'{"execute":"query-sta')
            first.close()
            second = connect()
            second.line()
            assert second.execute(b'{"execute":"query-status"}')["error"]["class"] == "CommandNotFound"
            assert second.execute(NEGOTIATE) == {"return": {}}
            assert "unexpected" in second.execute(b'{"exec-oob":"query-yank"}')["error"]["desc"]
            assert "No file descriptor" in second.run("add-fd")["error"]["desc"]
            second.close()


def test_a_client_that_has_ended_its_input_is_still_answered(side: Side) -> None:
    client = side.open()
    client.send(b"".join(b'{"execute":"query-name","id":%d}' % number for number in range(20)))
    client.socket.shutdown(socket.SHUT_WR)
    assert [client.message()["id"] for _ in range(20)] == [*range(20)]
    assert client.at_end()

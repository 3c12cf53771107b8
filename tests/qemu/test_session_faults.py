# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests clients that send invalid input, stall, flood and die: none affects others, or leaves anything in QEMU."""

from __future__ import annotations

import json
import os
import random
import select
import socket
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

from tests.qemu.qmp_fixtures import NEGOTIATE, SCALE, Client, Kind, Machine, Server, scaled, shared, wait_until
from vmspawn.qmp import limits

Shared = tuple[Machine, Server]

QUERY = b'{"execute":"query-status","id":"x"}'


@pytest.fixture(scope="module")
def both(qemu: str, kind: Kind) -> Iterator[Shared]:
    with shared(qemu, kind=kind) as made:
        # QEMU 7.2 removes descriptor sets only while the machine runs.
        with_session(made[1], lambda client: client.execute(b'{"execute":"cont"}'))
        yield made


@pytest.fixture(autouse=True)
def nothing_left(both: Shared) -> Iterator[None]:
    """Check that a test leaves no session, no descriptor in either process, and no descriptor set in QEMU."""
    machine, server = both
    wait_until(lambda: not server.sessions(), "the end of earlier sessions")
    before = open_descriptors(machine)
    yield
    wait_until(lambda: not server.sessions(), "the end of the sessions")
    wait_until(lambda: open_descriptors(machine) == before, "the closing of all descriptors")
    with_session(
        server, lambda client: wait_until(lambda: client.run("query-fdsets") == {"return": []}, "the removal of sets")
    )


def open_descriptors(machine: Machine) -> tuple[int, int]:
    """Return the numbers of open descriptors of this process and of QEMU."""
    return len(os.listdir("/proc/self/fd")), machine.descriptors()


def with_session(server: Server, use: Any) -> None:
    client = server.open().negotiate()
    use(client)
    client.close()


def a_file() -> int:
    """Open a file without a name; the caller owns the descriptor."""
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


#: Commands of clients that die while they send them. The large one goes to another monitor.
LAST_WORDS = b"".join(
    (
        NEGOTIATE,
        b'{"execute":"query-qmp-schema"}',
        b'{"execute":"getfd","arguments":{"fdname":"n"}}',
        QUERY * 3,
        b'{"execute":"add-fd"}',
        b'{"execute":"qom-get","arguments":{"path":"/","property":"%b"}}' % (b"x" * limits.BULK_SIZE),
        b'{"exec-oob":"query-yank"}',
    )
)


def a_chance() -> random.Random:
    """Return a random generator. Its seed is the same in each usual run, so that a failure is due to a change."""
    seed = 1 if SCALE == 1 else random.randrange(1 << 32)
    print(f"seed {seed}")
    return random.Random(seed)


def a_dying_client(server: Server, chance: random.Random, fd: int) -> Client:
    """Open a client that has sent a part of its commands. The caller closes it."""
    client = server.open()
    # Half of the cuts come before the large command, which is nearly all of the stream.
    cut = chance.randrange(chance.choice((400, len(LAST_WORDS))))
    client.send(LAST_WORDS[:cut] or b" ", [fd] if chance.random() < 0.3 else [])
    if chance.random() < 0.5:
        client.line()
    return client


@pytest.mark.scaled
def test_a_client_may_die_at_any_point_of_any_command(both: Shared) -> None:
    """Meanwhile, another client gets the replies to its own commands."""
    _, server = both
    honest = server.open().negotiate()
    chance = a_chance()
    fd = a_file()
    for number in range(scaled(100)):
        a_dying_client(server, chance, fd).close()
        assert honest.execute(b'{"execute":"query-name","id":%d}' % number) == {"return": {}, "id": number}
    os.close(fd)
    honest.close()


def test_a_client_that_does_not_read_is_held_back_alone(both: Shared) -> None:
    """The client's session takes no more commands until the client reads. Meanwhile, another client is served."""
    _, server = both
    stalled = server.open().negotiate()
    honest = server.open().negotiate()
    session = server.sessions()[0]
    count = 60
    stalled.send(b'{"execute":"query-qmp-schema"}' * count)
    wait_until(lambda: session.unread > limits.OUTPUT_HELD, "the limit of unread output")
    for _ in range(50):
        assert honest.execute(QUERY)["id"] == "x"
        assert session.unread < limits.OUTPUT_HELD + (1 << 20)
    assert session.commands < count
    replies = [stalled.line() for _ in range(count)]
    assert set(replies) == {replies[0]}
    assert b"return" in replies[0]
    assert stalled.execute(QUERY)["id"] == "x"
    stalled.close()
    honest.close()


@pytest.mark.parametrize("who", ["native", "session"])
@pytest.mark.parametrize("command", [b'{"execute":"query-qmp-schema"}', b'{"execute":"query-version","id":"xyz"}'])
def test_a_client_may_write_everything_before_it_reads(both: Shared, who: str, command: bytes) -> None:
    """The commands exceed the socket's buffer, and the replies the session's limit; all are answered, as by QEMU."""
    machine, server = both
    client = machine.native(2) if who == "native" else server.open()
    client.negotiate()
    count = 60 if b"schema" in command else 15_000
    client.send(command * count)
    replies = [client.line() for _ in range(count)]
    assert set(replies) == {replies[0]}
    assert b"return" in replies[0]
    client.close()


def test_a_client_that_has_ended_its_input_may_read_late(both: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client's queued output has a deadline only after QEMU's exit."""
    monkeypatch.setattr(limits, "DRAIN_TIMEOUT", 0.0)
    _, server = both
    client = server.open().negotiate()
    (session,) = server.sessions()
    client.send(b'{"execute":"query-qmp-schema"}' * 4)
    client.socket.shutdown(socket.SHUT_WR)
    wait_until(lambda: session.commands == 4 and not session.queued, "the last reply")
    assert session.unread
    assert len([client.line() for _ in range(4)]) == 4
    assert client.at_end()
    client.close()


def test_only_the_client_that_reads_no_events_is_disconnected(both: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client is disconnected at its limit of unread output, while another client is served."""
    # With the usual limit, QEMU would need a minute for that many events.
    monkeypatch.setattr(limits, "OUTPUT_SIZE", 1 << 18)
    _, server = both
    stalled = server.open().negotiate()
    honest = server.open().negotiate()
    (session, _other) = server.sessions()
    name = "j" * (limits.BULK_SIZE - 200)
    options = {"driver": "file", "filename": "/proc/nonexistent/image", "size": 1}
    while session in server.sessions():
        assert session.unread <= limits.OUTPUT_SIZE + (1 << 16)
        # Each event of a job has the job's name.
        honest.run("blockdev-create", job_id=name, options=options)
        while honest.run("job-dismiss", id=name) != {"return": {}}:
            pass
    assert session.bytes_out > limits.OUTPUT_SIZE
    assert session.unread == 0
    assert honest.execute(QUERY)["id"] == "x"
    stalled.close()
    honest.close()


def test_a_flood_does_not_keep_others_from_their_turn(both: Shared) -> None:
    _, server = both
    flood = server.open().negotiate()
    honest = server.open().negotiate()
    flood.send(QUERY * 1500)
    answered = 0
    for _ in range(20):
        assert honest.execute(QUERY)["id"] == "x"
    flood.socket.setblocking(False)
    try:
        while data := flood.socket.recv(1 << 20):
            answered += data.count(b"\n")
    except BlockingIOError:
        pass
    # The sessions take turns: for twenty replies to one client, the flood got about as many, and far from all.
    assert answered < 1000
    flood.close()
    honest.close()


def test_half_a_command_delays_no_other_client(both: Shared) -> None:
    _, server = both
    half = server.open().negotiate()
    half.send(b'{"execute":"query-sta')
    other = server.open().negotiate()
    assert other.execute(QUERY)["id"] == "x"
    half.send(b'tus"}')
    assert "return" in half.message()
    half.close()
    other.close()


def test_a_command_that_is_too_large_gets_qemus_own_error(both: Shared) -> None:
    _, server = both
    client = server.open().negotiate()
    client.send(b'{"execute":"query-status","arguments":{"x":"')
    for _ in range(limits.COMMAND_SIZE // (1 << 20) + 1):
        client.send(b"x" * (1 << 20))
    assert client.message() == {"error": {"class": "GenericError", "desc": "JSON token size limit exceeded"}}
    client.send(b'"}}\xff' + QUERY)
    client.until("x")
    client.close()


def test_a_large_command_is_answered_in_order_and_others_are_served(both: Shared) -> None:
    """QEMU reads the large command for 0.3 s, in which it answers many small ones of another client."""
    _, server = both
    client = server.open().negotiate()
    other = server.open().negotiate()
    padding = "x" * (limits.BULK_SIZE * 4)
    client.send(json.dumps({"execute": "qom-get", "arguments": {"path": "/", "property": padding}, "id": 1}).encode())
    client.send(b'{"execute":"query-name","id":2}')
    answers = []

    def is_answered() -> bool:
        answers.append(other.execute(QUERY)["id"])
        return bool(select.select([client.socket], [], [], 0)[0])

    wait_until(is_answered, "the reply to the large command")
    # If the other client had to wait for the large command, it would get one answer.
    assert len(answers) > 3
    assert [client.message()["id"], client.message()["id"]] == [1, 2]
    client.close()
    other.close()


def test_a_name_of_getfd_belongs_to_one_client(both: Shared) -> None:
    _, server = both
    fd = a_file()
    first, second = server.open().negotiate(), server.open().negotiate()
    assert first.run("getfd", fds=[fd], fdname="mine") == {"return": {}}
    refused = second.run("getfd", fds=[fd], fdname="mine")
    assert refused["error"]["class"] == "GenericError"
    assert "mine" in refused["error"]["desc"]
    assert "error" in second.run("closefd", fdname="mine")
    first.close()
    wait_until(lambda: second.run("getfd", fds=[fd], fdname="mine") == {"return": {}}, "the release of the name")
    assert second.run("closefd", fdname="mine") == {"return": {}}
    os.close(fd)
    second.close()


def test_an_unused_descriptor_set_is_removed_with_its_client(both: Shared) -> None:
    _, server = both
    fd = a_file()
    client = server.open().negotiate()
    assert "return" in client.run("add-fd", fds=[fd])
    watcher = server.open().negotiate()
    assert len(watcher.run("query-fdsets")["return"]) == 1
    client.close()
    wait_until(lambda: watcher.run("query-fdsets") == {"return": []}, "the removal of the set")
    os.close(fd)
    watcher.close()


@pytest.mark.parametrize("who", ["native", "session"])
def test_descriptors_wait_for_the_command_that_takes_one(both: Shared, who: str) -> None:
    """docs/qemu.md, "Passed descriptors", has the facts."""
    machine, server = both
    fd = a_file()
    client = (machine.native(2) if who == "native" else server.open()).negotiate()
    missing = {"class": "GenericError", "desc": "No file descriptor supplied via SCM_RIGHTS"}
    assert client.run("getfd", fdname="a")["error"] == missing
    assert client.run("getfd", fds=[fd, fd], fdname="a") == {"return": {}}
    assert client.run("getfd", fdname="b")["error"] == missing
    assert "return" in client.run("query-status", fds=[fd])
    assert client.run("getfd", fdname="b") == {"return": {}}
    assert client.run("getfd", fdname="c")["error"] == missing
    for name in ("a", "b"):
        assert client.run("closefd", fdname=name) == {"return": {}}
    os.close(fd)
    client.close()


def test_a_descriptor_never_reaches_another_client(both: Shared) -> None:
    _, server = both
    fd = a_file()
    first, second = server.open().negotiate(), server.open().negotiate()
    first.run("query-status", fds=[fd])
    assert "No file descriptor" in second.run("add-fd")["error"]["desc"]
    os.close(fd)
    first.close()
    second.close()


def test_qemus_exit_ends_each_session_and_is_reported_once(qemu: str) -> None:
    with shared(qemu) as (machine, server):
        clients = [server.open().negotiate() for _ in range(50)]
        machine.kill()
        assert all(client.at_end() for client in clients)
        for client in clients:
            client.close()
        wait_until(lambda: bool(server.lost), "the report of QEMU's exit")
        assert len(server.lost) == 1
        assert "QEMU closed its monitor" in server.lost[0]


@pytest.mark.scaled
def test_clients_and_qemu_may_die_together(qemu: str) -> None:
    """The survivors read end of file, whatever was in flight, and nothing of the others is left."""
    chance = a_chance()
    fd = a_file()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(scaled(5)):
        with shared(qemu) as (machine, server):
            clients = [a_dying_client(server, chance, fd) for _ in range(30)]
            chance.shuffle(clients)
            for client in clients[:10]:
                client.close()
            machine.process.kill()
            for client in clients[10:20]:
                client.close()
            machine.kill()
            for client in clients[20:]:
                while client.line():
                    pass
                client.close()
            wait_until(lambda: not server.sessions(), "the end of the sessions")
            assert len(server.lost) == 1
        assert len(os.listdir("/proc/self/fd")) == before
    os.close(fd)


def test_waiting_for_a_monitor_in_use_times_out(qemu: str) -> None:
    from vmspawn.errors import Timeout

    with Machine(qemu, 1) as machine:
        holder = machine.native(0).negotiate()
        with Server(machine.connect(0)) as server, pytest.raises(Timeout, match="gave no greeting"):
            server.start(timeout=0.3)
        holder.close()


def test_an_out_of_band_command_overtakes_in_band_ones(qemu: str) -> None:
    with shared(qemu) as (_, server):
        client = server.open().negotiate(oob=True)
        slow = b'{"execute":"query-qmp-schema","id":%d}'
        client.send(b"".join(slow % n for n in range(5)) + b'{"exec-oob":"migrate-pause","id":"now"}')
        order = [client.message()["id"] for _ in range(6)]
        assert [each for each in order if each != "now"] == list(range(5))
        assert order.index("now") < 5
        client.close()
        plain: Client = server.open().negotiate()
        assert "unexpected" in plain.execute(b'{"exec-oob":"migrate-pause"}')["error"]["desc"]
        plain.close()

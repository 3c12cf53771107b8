# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the order of replies, in band and out of band, and of events, on a native monitor and on a session alike.

The sources are QEMU's docs/interop/qmp-spec.rst and monitor/qmp.c.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.qemu.qmp_fixtures import SCALE, Client, Kind, Machine, Server, Side, scaled, shared
from vmspawn.qmp import limits

Shared = tuple[Machine, Server]


# Replies.


def test_replies_come_in_the_order_of_the_commands(side: Side) -> None:
    """This includes the replies to commands that QEMU never runs."""
    client = side.open()
    kinds = (b'"execute":"query-qmp-schema"', b'"execute":1', b'"execute":"query-name"', b'"execute":"nope"', b'"x":1')
    client.send(b"".join(b'{%b,"id":%d}' % (kinds[number % len(kinds)], number) for number in range(100)))
    assert [client.message()["id"] for _ in range(100)] == [*range(100)]


#: Members of commands that QEMU runs, of commands that it refuses, and of messages that are not commands.
IN_BAND = (
    b'"execute":"query-name"',
    b'"execute":"query-qmp-schema"',
    b'"execute":"nope"',
    b'"execute":"query-balloon"',
    b'"execute":1',
    b'"execute":"query-name","extra":1',
    b'"nothing":1',
)

#: The same out of band. QEMU refuses commands that do not support that.
OUT_OF_BAND = (
    b'"exec-oob":"query-yank"',
    b'"exec-oob":"migrate-pause"',
    b'"exec-oob":"query-name"',
    b'"exec-oob":"nope"',
    b'"exec-oob":1',
    b'"exec-oob":"query-yank","extra":1',
)

#: Fewer commands than a monitor's queue holds. When the queue of eight is full, no command overtakes.
QUEUED = 6


@st.composite
def mixtures(draw: st.DrawFn) -> list[tuple[bytes, bool]]:
    """Return commands, and for each whether it is sent out of band."""
    chosen = draw(st.lists(st.booleans(), min_size=2, max_size=14))
    kept = [oob for place, oob in enumerate(chosen) if oob or chosen[:place].count(False) < QUEUED]
    return [(draw(st.sampled_from(OUT_OF_BAND if oob else IN_BAND)), oob) for oob in kept]


@pytest.mark.parametrize("who", ["native", "session"])
@pytest.mark.scaled
def test_out_of_band_replies_overtake_and_are_not_overtaken(both: Shared, who: str) -> None:
    with Side(who, *both) as side:
        client = side.open(oob=True)

        @given(mixtures())
        @settings(max_examples=scaled(100), derandomize=SCALE == 1, suppress_health_check=list(HealthCheck))
        def check(mixture: list[tuple[bytes, bool]]) -> None:
            client.send(b"".join(b'{%b,"id":%d}' % (each[0], number) for number, each in enumerate(mixture)))
            order = [client.message()["id"] for _ in mixture]
            in_band = [number for number in order if not mixture[number][1]]
            oob = [number for number in order if mixture[number][1]]
            assert in_band == sorted(in_band)
            assert oob == sorted(oob)
            for number in oob:
                assert all(order.index(number) < order.index(later) for later in in_band if later > number), order

        check()


def test_an_out_of_band_command_behind_a_full_queue_is_stuck(side: Side) -> None:
    """The specification warns of this: at most eight commands wait, and the monitor reads no more meanwhile."""
    client = side.open(oob=True)
    sent = 3 * limits.OOB_QUEUE
    slow = b"".join(b'{"execute":"query-qmp-schema","id":%d}' % number for number in range(sent))
    client.send(slow + b'{"exec-oob":"query-yank","id":"now"}')
    order = [client.message()["id"] for _ in range(sent + 1)]
    assert [each for each in order if each != "now"] == [*range(sent)]
    # One runs and eight wait; the commands before them have replies.
    assert order.index("now") >= sent - limits.OOB_QUEUE - 1


# Events.


def events(lines: list[bytes]) -> list[dict[str, Any]]:
    """Return decoded events, each with its timestamp."""
    found = [json.loads(line) for line in lines]
    for event in found:
        assert set(event) <= {"timestamp", "event", "data"}
        assert {type(value) for value in event["timestamp"].values()} == {int}
        assert event["timestamp"].keys() == {"seconds", "microseconds"}
    return found


def test_events_come_before_the_reply_of_the_command_that_caused_them(side: Side) -> None:
    client = side.open()
    for number in range(20):
        client.send(b'{"execute":"cont","id":%d}{"execute":"stop","id":%d}' % (2 * number, 2 * number + 1))
        assert [each["event"] for each in events(client.until(2 * number))] == ["RESUME"]
        assert [each["event"] for each in events(client.until(2 * number + 1))] == ["STOP"]


@pytest.mark.parametrize("who", ["native", "session"])
def test_quit_is_followed_by_its_event_its_reply_and_the_end(qemu: str, kind: Kind, who: str) -> None:
    with shared(qemu, kind=kind) as made, Side(who, *made) as side, Side("session", *made) as others:
        client, watcher = side.open(), others.open()
        client.send(b'{"execute":"quit","id":1}')
        (shutdown,) = events(client.until(1))
        assert shutdown["event"] == "SHUTDOWN"
        assert shutdown["data"] == {"guest": False, "reason": "host-qmp-quit"}
        assert client.at_end()
        assert watcher.message()["event"] == "SHUTDOWN"
        assert watcher.at_end()


def test_every_client_sees_the_same_events(both: Shared) -> None:
    """Native monitors and sessions send the same bytes, including the timestamp."""
    with Side("native", *both) as native, Side("session", *both) as sessions:
        clients = [native.open(), *(sessions.open() for _ in range(10))]
        for number in range(5):
            clients[-1].send(b'{"execute":"cont","id":%d}{"execute":"stop","id":"%d"}' % (number, number))
        seen = [[client.line() for _ in range(10)] for client in clients[:-1]]
        assert [each["event"] for each in events(seen[0])] == ["RESUME", "STOP"] * 5
        assert all(lines == seen[0] for lines in seen)
        clients[-1].until("4")


@pytest.fixture
def quorum(both: Shared) -> Iterator[Client]:
    """Yield a client of a QEMU with a quorum node `q`, one of whose three children fails to read."""
    _, server = both
    client = server.open().negotiate()
    good = {"driver": "null-co", "read-zeroes": True}
    bad = {"driver": "blkdebug", "image": good, "inject-error": [{"event": "none", "iotype": "read"}]}
    assert client.run("blockdev-add", driver="quorum", node_name="q", vote_threshold=2, children=[good, good, bad]) == {
        "return": {}
    }
    yield client
    assert client.run("blockdev-del", node_name="q") == {"return": {}}
    client.close()


def test_throttled_events_are_throttled_for_all_clients(side: Side, quorum: Client) -> None:
    """QUORUM_REPORT_BAD is sent at most once a second, and the last event of that second wins."""
    watcher = side.open()
    reads = 20
    for number in range(reads):
        assert quorum.run("human-monitor-command", command_line=f'qemu-io q "read {number * 512} 512"')
    sectors: list[int] = []
    while reads - 1 not in sectors:
        event = watcher.message()
        assert event["event"] == "QUORUM_REPORT_BAD"
        sectors.append(event["data"]["sector-num"])
    assert sectors[0] == 0
    assert sectors == sorted(sectors)
    # The reads came within milliseconds, so most of them have no event.
    assert len(sectors) < reads


@pytest.mark.parametrize("large", [False, True])
def test_events_come_before_the_reply_of_a_large_command_too(side: Side, large: bool) -> None:
    """In a session, a large command goes to the bulk monitor, and its events come on the other monitor."""
    client, watcher = side.open(), side.open()
    with tempfile.TemporaryDirectory() as folder, closing(side.server.open().negotiate()) as busy:
        # The name is too long for a file. The job reports that only after it was created and started.
        name = f"{folder}/" + "x" * (limits.BULK_SIZE if large else 300)
        for number in range(5):
            busy.send(b'{"execute":"query-qmp-schema"}' * 20)
            create_file(client, f"job{number}", name, number)
            before = [each["data"] for each in events(client.until(number))]
            assert before[:2] == [{"id": f"job{number}", "status": status} for status in ("created", "running")]
            status = before[-1]["status"]
            while status != "concluded":
                status = client.message()["data"]["status"]
            assert client.run("job-dismiss", id=f"job{number}") == {"return": {}}
            assert statuses_until_null(watcher)[:2] == ["created", "running"]
            statuses_until_null(busy)


def create_file(client: Client, job: str, name: str, id: int) -> None:
    arguments = {"job-id": job, "options": {"driver": "file", "filename": name, "size": 0}}
    client.send(json.dumps({"execute": "blockdev-create", "arguments": arguments, "id": id}).encode())


def statuses_until_null(client: Client) -> list[str]:
    """Return the states of a job up to its end."""
    statuses: list[str] = []
    while "null" not in statuses:
        message = client.message()
        if "event" in message:
            statuses.append(message["data"]["status"])
    return statuses

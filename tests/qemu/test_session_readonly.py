# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the commands that read-only sessions may run, and that no spelling of a message runs others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.qemu.qmp_fixtures import Client, Machine, Server

Shared = tuple[Machine, Server]

#: Commands that only read, and whose names do not show that.
READS = {
    *("qom-get", "qom-list", "qom-list-get", "qom-list-types", "qom-list-properties", "device-list-properties"),
    *("trace-event-get-state", "x-accel-stats", "x-debug-query-block-graph", "xen-event-list", "qmp_capabilities"),
}

#: Commands whose names are queries, and that change something.
MORE_THAN_QUERIES = {"query-rx-filter", "x-query-profile"}


@pytest.fixture
def reader(both: Shared) -> Iterator[Client]:
    client = both[1].open(read_only=True).negotiate()
    yield client
    client.close()


def schema(client: Client) -> list[dict[str, Any]]:
    found = client.run("query-qmp-schema")["return"]
    assert isinstance(found, list)
    return found


def is_refused(reply: dict[str, Any]) -> bool:
    return "this session is read-only" in reply.get("error", {}).get("desc", "")


def test_each_command_of_this_qemu_is_allowed_or_refused_by_the_rule(reader: Client) -> None:
    """An argument that no command has keeps QEMU from running the allowed commands."""
    names = [entry["name"] for entry in schema(reader) if entry["meta-type"] == "command"]
    allowed = {name for name in names if not is_refused(reader.run(name, no_such_argument=1))}
    queries = {name for name in names if name.startswith(("query-", "x-query-")) and name not in MORE_THAN_QUERIES}
    assert allowed == queries | (READS & set(names))
    assert {"qom-get", "query-status", "device-list-properties"} <= allowed
    assert not {"stop", "quit", "ringbuf-read", "add-fd", "human-monitor-command", "query-rx-filter"} & allowed


def test_allowed_commands_have_results(reader: Client) -> None:
    """A command without a result would have an effect."""
    entries = {entry["name"]: entry for entry in schema(reader)}
    for name in READS & entries.keys() - {"qmp_capabilities"}:
        result = entries[entries[name]["ret-type"]]
        assert result["meta-type"] != "object" or result["members"], name


@pytest.mark.parametrize(
    "message",
    [
        b'{"execute":"stop","id":1}',
        b'{"execute":"s\\u0074op","id":1}',
        b'{"\\u0065xecute":"stop","id":1}',
        b"{'execute':'stop','id':1}",
        b'{"execute":"stop","arguments":{},"id":1}',
        b'{"execute":"stop","arguments":{"x":"%b"},"id":1}' % (b"x" * 50000),
        b'{"exec-oob":"migrate-pause","id":1}',
    ],
)
def test_a_refused_command_is_refused_in_any_spelling(both: Shared, message: bytes) -> None:
    client = both[1].open(read_only=True).negotiate(oob=True)
    reply = client.execute(message)
    assert reply["id"] == 1
    assert reply["error"]["class"] == "GenericError"
    assert is_refused(reply)
    client.close()


@pytest.mark.parametrize(
    "message",
    [
        b'{"execute":"query-status","execute":"stop"}',
        b'{"execute":"query-status","\\u0065xecute":"stop"}',
        b'{"execute":"query-status\\u0000stop"}',
    ],
)
def test_no_message_is_two_commands(reader: Client, message: bytes) -> None:
    assert "error" in reader.execute(message)


def test_a_reader_sees_events(reader: Client, both: Shared) -> None:
    writer = both[1].open().negotiate()
    writer.send(b'{"execute":"cont"}{"execute":"stop","id":1}')
    writer.until(1)
    assert [reader.message()["event"] for _ in range(2)] == ["RESUME", "STOP"]
    writer.close()

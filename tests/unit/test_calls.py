# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests connections to a control socket that end while a reply is awaited."""

from __future__ import annotations

import asyncio
import socket

import pytest

from vmspawn.control.calls import Connection
from vmspawn.errors import NotConnected

DEADLINE = 10.0


async def test_the_next_connection_gets_its_reply() -> None:
    """The next connection gets the number of the closed descriptor, which the event loop must have forgotten."""
    ours, theirs = socket.socketpair()
    number = ours.fileno()
    first = Connection("machine", ours)
    waiting = asyncio.create_task(first.receive())
    await asyncio.sleep(0)
    first.close()
    theirs.close()
    ours, theirs = socket.socketpair()
    assert number in (ours.fileno(), theirs.fileno())
    if theirs.fileno() == number:
        ours, theirs = theirs, ours
    second = Connection("machine", ours)
    try:
        receiving = asyncio.create_task(second.receive())
        theirs.sendall(b'{"parameters":{"answer":42}}\0')
        assert (await asyncio.wait_for(receiving, DEADLINE)).parameters == {"answer": 42}
        with pytest.raises(NotConnected, match="closed"):
            await asyncio.wait_for(waiting, DEADLINE)
    finally:
        second.close()
        theirs.close()


async def test_a_closed_connection_receives_nothing() -> None:
    ours, theirs = socket.socketpair()
    connection = Connection("machine", ours)
    connection.close()
    connection.close()
    theirs.close()
    with pytest.raises(NotConnected, match="closed"):
        await asyncio.wait_for(connection.receive(), DEADLINE)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that the closed far end of a socket is noticed without reading from the socket."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from vmspawn.inside.hang_ups import HangUps, unread

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def hang_ups() -> AsyncIterator[HangUps]:
    hang_ups = HangUps()
    yield hang_ups
    hang_ups.close()


@pytest.mark.parametrize("way", ["close", "shutdown"])
async def test_the_end_of_a_stream_is_noticed_and_unread_data_stays(hang_ups: HangUps, way: str) -> None:
    near, far = socket.socketpair()
    with near, far:
        noticed = asyncio.Event()
        hang_ups.watch(near, noticed.set)
        far.sendall(b"data")
        # Data is not the end of the stream.
        await asyncio.sleep(0.05)
        assert not noticed.is_set()
        if way == "close":
            far.close()
        else:
            far.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(20):
            await noticed.wait()
        assert unread(near) == 4
        assert near.recv(10) == b"data"
        assert unread(near) == 0


async def test_a_forgotten_socket_is_not_reported_while_a_copy_of_it_is_open(hang_ups: HangUps) -> None:
    near, far = socket.socketpair()
    copy = near.dup()
    other_near, other_far = socket.socketpair()
    with copy, other_near:
        reported: list[str] = []
        noticed = asyncio.Event()
        hang_ups.watch(near, lambda: reported.append("first"))
        hang_ups.forget(near)
        hang_ups.forget(near)
        near.close()
        far.close()
        hang_ups.watch(other_near, noticed.set)
        other_far.close()
        async with asyncio.timeout(20):
            await noticed.wait()
        assert reported == []


async def test_closing_twice_is_harmless() -> None:
    hang_ups = HangUps()
    hang_ups.close()
    hang_ups.close()

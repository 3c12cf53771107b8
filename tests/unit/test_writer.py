# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the write queue on real sockets: order, descriptors, withdrawal, disconnect."""

import asyncio
import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmspawn.aio.writer import Writer

#: More bytes than a socket buffers.
MUCH = 1 << 20

DEADLINE = 20.0


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    with ours, theirs:
        yield ours, theirs


async def read(theirs: socket.socket, count: int) -> bytes:
    loop, data = asyncio.get_running_loop(), b""
    async with asyncio.timeout(DEADLINE):
        while len(data) < count:
            data += await loop.sock_recv(theirs, count - len(data))
    return data


@given(pieces=st.lists(st.binary(min_size=1, max_size=9000), max_size=200), apart=st.integers(0, 3))
def test_all_bytes_come_in_order_whatever_their_sizes(pieces: list[bytes], apart: int) -> None:
    async def run() -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            theirs.setblocking(False)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            emptied = asyncio.Event()
            writer = Writer.of_socket(ours, on_empty=emptied.set)
            for number, piece in enumerate(pieces):
                if apart and number % apart == 0:
                    writer.write_message(piece)
                else:
                    writer.write(piece)
            total = b"".join(pieces)
            waited = writer.pending > 0
            assert writer.written + writer.pending == len(total)
            assert await read(theirs, len(total)) == total
            if waited:
                async with asyncio.timeout(DEADLINE):
                    await emptied.wait()
            assert (writer.pending, writer.written) == (0, len(total))
            writer.close()

    asyncio.run(run())


async def test_descriptors_go_with_their_message_and_are_released_then(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    released: list[str] = []
    writer = Writer.of_socket(ours)
    writer.write(b"x" * MUCH)
    reader, other = os.pipe()
    writer.write_message(b"here", (reader,), on_begun=lambda: released.append("reader"))
    writer.write_message(b"there", (other,), on_begun=lambda: released.append("other"))
    writer.write(b"end")
    assert released == []
    await read(theirs, MUCH)
    loop = asyncio.get_running_loop()
    data, fds = b"", []
    async with asyncio.timeout(DEADLINE):
        while not data.endswith(b"end"):
            came = loop.create_future()
            loop.add_reader(theirs, came.set_result, None)
            await came
            loop.remove_reader(theirs)
            more, found, _, _ = socket.recv_fds(theirs, 65536, 4)
            data += more
            fds += [(data.index(more) if more else 0, fd) for fd in found]
    assert data == b"herethereend"
    assert [start for start, _ in fds] == [0, 4]
    assert released == ["reader", "other"]
    writer.close()
    for fd in (reader, other, *(fd for _, fd in fds)):
        os.close(fd)


async def test_a_message_that_is_not_begun_can_be_withdrawn(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    released: list[int] = []
    writer = Writer.of_socket(ours)
    first = writer.write_message(b"x" * MUCH)
    second = writer.write_message(b"second", on_begun=lambda: released.append(2))
    writer.write(b"third")
    assert not writer.withdraw(first)
    assert writer.withdraw(second)
    assert not writer.withdraw(second)
    assert released == [2]
    assert await read(theirs, MUCH + 5) == b"x" * MUCH + b"third"
    writer.close()


async def test_a_reader_that_is_gone_is_reported_once_and_nothing_is_kept(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    lost: list[OSError] = []
    released: list[int] = []
    gone = asyncio.Event()

    def on_lost(error: OSError) -> None:
        lost.append(error)
        gone.set()

    writer = Writer.of_socket(ours, on_lost=on_lost)
    writer.write(b"x" * MUCH)
    writer.write_message(b"never", on_begun=lambda: released.append(1))
    theirs.close()
    async with asyncio.timeout(DEADLINE):
        await gone.wait()
    writer.write(b"more")
    writer.write_message(b"more", on_begun=lambda: released.append(2))
    assert len(lost) == 1
    assert writer.pending == 0
    assert released == [1, 2]
    writer.close()


async def test_small_pieces_that_wait_are_joined(pair: tuple[socket.socket, socket.socket]) -> None:
    """Input that is typed byte by byte while the guest does not read takes little more memory than its bytes."""
    ours, theirs = pair
    sizes: list[int] = []

    def send(data: bytes) -> int:
        sizes.append(len(data))
        return ours.send(data)

    writer = Writer(ours.fileno(), send)
    writer.write(b"x" * MUCH)
    for _ in range(10_000):
        writer.write(b"y")
    assert await read(theirs, MUCH + 10_000) == b"x" * MUCH + b"y" * 10_000
    # All queued data was written in larger pieces.
    assert sizes.count(1) == 0
    writer.close()

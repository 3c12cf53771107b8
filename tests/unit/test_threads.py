# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests opening files in threads, with a thread that hangs until a pipe is written to, as with storage that hangs."""

import asyncio
import contextlib
import os
from collections.abc import Iterator

import pytest

from vmspawn.aio.threads import open_in_thread

DEADLINE = 10.0


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for fd in (reader, writer):
        os.close(fd)


def is_open(fd: int) -> bool:
    with contextlib.suppress(OSError):
        os.fstat(fd)
        return True
    return False


async def test_the_event_loop_continues_while_a_file_is_opened(pipe: tuple[int, int]) -> None:
    reader, writer = pipe

    def open_slowly() -> int:
        os.read(reader, 1)
        return os.open("/dev/null", os.O_RDONLY)

    opening = asyncio.create_task(open_in_thread(open_slowly, os.close))
    # The thread waits for a byte that only this coroutine writes.
    await asyncio.sleep(0)
    os.write(writer, b"x")
    fd = await asyncio.wait_for(opening, DEADLINE)
    assert is_open(fd)
    os.close(fd)


async def test_a_file_that_opens_after_the_caller_was_cancelled_is_closed(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    opened: list[int] = []
    closed = asyncio.Event()

    def open_slowly() -> int:
        os.read(reader, 1)
        opened.append(os.open("/dev/null", os.O_RDONLY))
        return opened[0]

    def close(fd: int) -> None:
        os.close(fd)
        closed.set()

    opening = asyncio.create_task(open_in_thread(open_slowly, close))
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert not opened
    os.write(writer, b"x")
    await asyncio.wait_for(closed.wait(), DEADLINE)
    assert not is_open(opened[0])


async def test_the_error_of_a_file_that_cannot_be_opened_is_raised() -> None:
    with pytest.raises(FileNotFoundError):
        await open_in_thread(lambda: os.open("/none", os.O_RDONLY), os.close)

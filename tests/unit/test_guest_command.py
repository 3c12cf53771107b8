# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the copying of a command's output, without a guest."""

import errno
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vmspawn.cli.ctl.guest_command import _Output

DEADLINE = 60.0


@contextmanager
def copied(data: bytes, target: int) -> Iterator[_Output]:
    """Copy a command's output to a descriptor until all is written, or writing has failed."""
    guest, source = socket.socketpair()
    changed = threading.Condition()
    with guest:
        output = _Output(source, target, changed, None)
        guest.sendall(data)
        with changed:
            assert changed.wait_for(lambda: output.has(len(data)), DEADLINE), "the output is not copied"
        yield output


def test_output_that_is_written_has_no_error() -> None:
    reading, writing = os.pipe()
    with open(reading, "rb") as reader, open(writing, "wb") as writer, copied(b"data", writer.fileno()) as output:
        assert (output.total, output.errno) == (4, 0)
        assert os.read(reader.fileno(), 99) == b"data"


def test_a_full_disk_is_an_error() -> None:
    with open("/dev/full", "wb") as full, copied(b"data", full.fileno()) as output:
        assert (output.total, output.errno) == (0, errno.ENOSPC)


def test_a_reader_that_has_closed_its_pipe_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as writer, copied(b"data", writer.fileno()) as output:
        assert (output.total, output.errno) == (0, 0)


def test_a_pipe_that_does_not_block_is_waited_for() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    got = bytearray()

    def read() -> None:
        with open(reading, "rb") as reader:
            while piece := reader.read(4096):
                got.extend(piece)

    filled = 0
    with pytest.raises(BlockingIOError):
        while True:
            filled += os.write(writing, bytes(4096))
    thread = threading.Thread(target=read)
    guest, source = socket.socketpair()
    changed = threading.Condition()
    with open(writing, "wb") as writer, guest:
        output = _Output(source, writer.fileno(), changed, None)
        guest.sendall(b"data")
        thread.start()
        with changed:
            assert changed.wait_for(lambda: output.has(4), DEADLINE), "the output is not copied"
    thread.join(DEADLINE)
    assert (output.total, output.errno) == (4, 0)
    assert bytes(got) == bytes(filled) + b"data"

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the guest printed while nobody read is put together from QEMU's log and what was left in the pipe."""

import contextlib
import os

import pytest

from vmspawn.console import unread
from vmspawn.host.consolelog import KEPT_MAX, ConsoleLog

LINES = b"".join(b"line %d\r\n" % n for n in range(1000))


@pytest.mark.parametrize("emptied", [0, 10, 5000, 8000])
@pytest.mark.parametrize("died", [8000, 8010, len(LINES)])
def test_the_pipe_and_the_log_make_one_text(emptied: int, died: int) -> None:
    """The pipe has what came until the manager died, the log what came since it was emptied last."""
    assert unread.join(LINES[:died], LINES[emptied:]) == LINES


@pytest.mark.parametrize("piped", [b"", b"login: ", b"a"])
def test_nothing_is_lost_where_one_is_short(piped: bytes) -> None:
    assert unread.join(piped, b"") == piped
    assert unread.join(b"", piped) == piped
    assert unread.join(piped, piped) == piped


def append(log: ConsoleLog) -> int:
    """A descriptor like QEMU's."""
    return os.open(f"/proc/self/fd/{log.fd}", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)


def fill(writer: int) -> None:
    """Write until nothing more fits, as a serial port does in the end: byte by byte."""
    for size in (4096, 1):
        with contextlib.suppress(OSError):
            while os.write(writer, b"z" * size):
                pass


def test_qemus_log_ends_at_its_bound() -> None:
    log = ConsoleLog.make()
    assert log is not None
    writer = append(log)
    try:
        for _ in range(3):
            assert (log.size, log.read(0)) == (0, b"")
            assert os.write(writer, b"x" * (KEPT_MAX - 1)) == KEPT_MAX - 1
            assert log.read(log.size) == b"x" * (KEPT_MAX - 1)
            log.empty()
            # As the guest goes on; it makes the position valid again for more than what was left.
            os.write(writer, b"y")
            log.empty()
        os.write(writer, b"x" * (KEPT_MAX - 1))
        os.write(writer, b"y")
        with pytest.raises(OSError, match="Invalid argument"):
            os.write(writer, b"z")
        assert log.size == KEPT_MAX
    finally:
        os.close(writer)
        log.close()


def test_what_does_not_fit_is_said_to_be_missing() -> None:
    log = ConsoleLog.make()
    assert log is not None
    source, sink = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    writer = append(log)
    try:
        for fd in (sink, writer):
            os.write(fd, b"piped")
        os.write(writer, LINES)
        assert unread.take(source, log) == b"piped" + LINES
        fill(writer)
        found = ConsoleLog.of(os.getpid())
        assert found is not None
        assert unread.take(source, found) == b"z" * KEPT_MAX + unread.MISSING
        assert found.size == 0
        found.close()
    finally:
        for fd in (source, sink, writer):
            os.close(fd)
        log.close()


def test_that_nothing_was_kept_is_said() -> None:
    source, sink = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.write(sink, LINES)
        assert unread.take(source, None) == LINES + unread.NOT_KEPT
    finally:
        os.close(source)
        os.close(sink)


def test_a_pipe_that_keeps_what_it_can() -> None:
    source, sink = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.write(sink, LINES)
        assert unread.take(source, None, kept_in_pipe=True) == LINES
        room = os.write(sink, b"z" * (1 << 20))
        assert unread.take(source, None, kept_in_pipe=True) == b"z" * room + unread.MISSING
    finally:
        os.close(source)
        os.close(sink)


def test_a_process_without_a_log_has_none() -> None:
    assert ConsoleLog.of(os.getpid()) is None
    log = ConsoleLog.make()
    assert log is not None
    found = ConsoleLog.of(os.getpid())
    assert found is not None
    assert os.fstat(found.fd).st_ino == os.fstat(log.fd).st_ino
    found.close()
    log.close()

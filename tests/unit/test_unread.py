# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that unread output of the guest is joined from QEMU's log and the pipe."""

import contextlib
import os
import resource
import signal
from collections.abc import Iterator

import pytest

from vmspawn.console import unread
from vmspawn.host.consolelog import KEPT_MAX, ConsoleLog, bounded

LINES = b"".join(b"line %d\r\n" % n for n in range(1000))


@pytest.mark.parametrize("emptied", [0, 10, 5000, 8000])
@pytest.mark.parametrize("died", [8000, 8010, len(LINES)])
def test_the_pipe_and_the_log_make_one_text(emptied: int, died: int) -> None:
    """The pipe has the output until the manager's death, the log has the output since it was emptied last."""
    assert unread.join(LINES[:died], LINES[emptied:]) == LINES


@pytest.mark.parametrize("piped", [b"", b"login: ", b"a"])
def test_nothing_is_lost_if_the_pipe_or_the_log_is_short(piped: bytes) -> None:
    assert unread.join(piped, b"") == piped
    assert unread.join(b"", piped) == piped
    assert unread.join(piped, piped) == piped


@pytest.fixture
def as_in_qemu() -> Iterator[None]:
    """Apply QEMU's file size limit. SIGXFSZ is ignored, as in every Python process and its children."""
    assert signal.getsignal(signal.SIGXFSZ) is signal.SIG_IGN
    with bounded():
        yield


def append(log: ConsoleLog) -> int:
    """Open a descriptor as QEMU does."""
    return os.open(f"/proc/self/fd/{log.fd}", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)


def fill(writer: int) -> None:
    """Write until nothing more fits: blocks, and then single bytes, as a serial port writes."""
    for size in (4096, 1):
        with contextlib.suppress(OSError):
            while os.write(writer, b"z" * size):
                pass


@pytest.mark.usefixtures("as_in_qemu")
def test_qemus_log_ends_at_its_bound_and_begins_again() -> None:
    log = ConsoleLog.make()
    assert log is not None
    writer = append(log)
    try:
        for _ in range(3):
            assert (log.size, log.read(0), log.is_full) == (0, b"", False)
            assert os.write(writer, b"x" * (KEPT_MAX - 1)) == KEPT_MAX - 1
            assert log.read(log.size) == b"x" * (KEPT_MAX - 1)
            assert not log.is_full
            # A write that does not fit writes as much as fits.
            assert os.write(writer, b"yz") == 1
            with pytest.raises(OSError, match="File too large"):
                os.write(writer, b"z")
            assert (log.size, log.is_full) == (KEPT_MAX, True)
            log.empty()
    finally:
        os.close(writer)
        log.close()


def test_the_limit_applies_to_processes_started_meanwhile() -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with bounded():
        assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == (1 << 63) - (1 << 20)
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == before


def test_there_is_no_log_if_qemu_would_be_killed_at_its_bound() -> None:
    """SIGXFSZ would kill a QEMU that does not ignore it."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        assert ConsoleLog.make() is None
    finally:
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.usefixtures("as_in_qemu")
def test_lost_output_is_reported() -> None:
    log = ConsoleLog.make()
    assert log is not None
    source, sink = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    writer = append(log)
    try:
        for fd in (sink, writer):
            os.write(fd, b"piped")
        os.write(writer, LINES)
        assert unread.take(source, log) == b"piped" + LINES
        for _ in range(2):
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


def test_a_missing_log_is_reported() -> None:
    source, sink = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.write(sink, LINES)
        assert unread.take(source, None) == LINES + unread.NOT_KEPT
    finally:
        os.close(source)
        os.close(sink)


def test_a_pipe_keeps_as_much_as_fits() -> None:
    source, sink = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.write(sink, LINES)
        assert unread.take(source, None, kept_in_pipe=True) == LINES
        room = os.write(sink, b"z" * (1 << 20))
        assert unread.take(source, None, kept_in_pipe=True) == b"z" * room + unread.MISSING
    finally:
        os.close(source)
        os.close(sink)


def test_a_log_is_found_only_in_a_process_with_a_log() -> None:
    assert ConsoleLog.of(os.getpid()) is None
    log = ConsoleLog.make()
    assert log is not None
    found = ConsoleLog.of(os.getpid())
    assert found is not None
    assert os.fstat(found.fd).st_ino == os.fstat(log.fd).st_ino
    found.close()
    log.close()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests connecting to unix sockets, and waiting for descriptors."""

import fcntl
import os
import resource
import socket
from pathlib import Path

import pytest

from vmspawn.aio.sockets import connect, is_readable, listen

#: Seconds that a test waits for an error that must come.
SHORT = 0.01


def test_connecting_to_a_listener_with_a_full_queue_times_out(tmp_path: Path) -> None:
    address = str(tmp_path / "socket")
    # A queue of length 0 takes one connection.
    with listen(address, 0) as listener, connect(address, timeout=SHORT):
        with pytest.raises(TimeoutError, match=f"accepted no connection within {SHORT:g} s"):
            connect(address, timeout=SHORT)
        with listener.accept()[0], connect(address, timeout=SHORT), listener.accept()[0]:
            pass


def test_a_connected_socket_blocks_without_a_timeout(tmp_path: Path) -> None:
    with listen(str(tmp_path / "socket"), 1), connect(str(tmp_path / "socket"), timeout=SHORT) as connected:
        assert connected.gettimeout() is None
        assert not any(connected.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, 16))


def test_an_address_without_a_listener_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        connect(str(tmp_path / "none"), timeout=SHORT)


def test_a_descriptor_of_any_number_is_waited_for() -> None:
    reading, writing = os.pipe()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard <= 2000:
        pytest.skip("this user cannot have 2000 descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2001), hard))
    try:
        high = fcntl.fcntl(reading, fcntl.F_DUPFD_CLOEXEC, 2000)
        assert not is_readable(high, within=SHORT)
        os.close(writing)
        assert is_readable(high, within=0)
        os.close(high)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(reading)

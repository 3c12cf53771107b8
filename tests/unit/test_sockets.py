# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests connecting to unix sockets."""

import socket
from pathlib import Path

import pytest

from vmspawn.aio.sockets import connect, listen

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

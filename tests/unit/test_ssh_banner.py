# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests how `vmctl wait --for=ssh` recognizes an SSH server."""

from __future__ import annotations

import asyncio
import socket

import pytest

from vmspawn.inside.waiting import _is_ssh_server

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize(
    ("banner", "expected"), [(b"SSH-2.0-OpenSSH_9.2\r\n", True), (b"HTTP/1.1 200 OK\r\n", False), (b"", False)]
)
async def test_a_server_is_recognized_by_its_banner(banner: bytes, expected: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        asking = asyncio.create_task(_is_ssh_server("127.0.0.1", server.getsockname()[1]))
        accepted, _ = await asyncio.to_thread(server.accept)
        with accepted:
            accepted.sendall(banner)
        assert await asking is expected


async def test_a_server_that_sends_nothing_is_not_recognized() -> None:
    """QEMU keeps the connection of a guest that was reset meanwhile."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert not await _is_ssh_server("127.0.0.1", server.getsockname()[1], timeout=0.1)


async def test_a_port_without_a_listener_is_no_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address, port = server.getsockname()
    assert not await _is_ssh_server(address, port)

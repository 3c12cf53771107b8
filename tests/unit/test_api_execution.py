# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that a command whose streams are being opened ends with the program's interest in it."""

from __future__ import annotations

import asyncio
import socket

import pytest

from vmspawn.agent.protocol import STDERR, STDIN, STDOUT
from vmspawn.api.execution import End, attend


class Far:
    """The other ends of a command's streams."""

    def __init__(self) -> None:
        pairs = {name: socket.socketpair() for name in (STDIN, STDOUT, STDERR)}
        self.streams = {name: ours for name, (ours, _) in pairs.items()}
        self.theirs = [theirs for _, theirs in pairs.values()]
        self.is_closed = False

    async def ended(self) -> End:
        """Return the end of a command without output."""
        return End(0, 0, 0)

    async def resize(self, rows: int, columns: int) -> None:
        """Do nothing: the command has no terminal."""

    async def signal(self, number: int) -> None:
        """Do nothing: the command has ended."""

    async def close(self) -> None:
        """Record that the command was ended."""
        self.is_closed = True


@pytest.mark.parametrize("turns", range(1, 8))
async def test_a_command_is_ended_if_its_program_gives_up_while_the_streams_are_opened(turns: int) -> None:
    far = Far()
    opening = asyncio.create_task(attend(far))
    for _ in range(turns):
        await asyncio.sleep(0)
    if opening.cancel():
        with pytest.raises(asyncio.CancelledError):
            await opening
    else:
        await (await opening).close()
    assert far.is_closed
    for each in far.theirs:
        with each:
            each.settimeout(10)
            # The transports close their sockets in their next turn.
            await asyncio.sleep(0)
            assert each.recv(1) == b""

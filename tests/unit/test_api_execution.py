# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that a command is ended if the program cancels `attach` while the command's streams are opened."""

from __future__ import annotations

import asyncio
import socket

import pytest

from vmspawn.agent.protocol import STDERR, STDIN, STDOUT
from vmspawn.api.execution import End, attend


class Command:
    """A command without output. `theirs` are the guest's ends of its streams."""

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
async def test_a_command_is_ended_if_opening_its_streams_is_cancelled(turns: int) -> None:
    command = Command()
    opening = asyncio.create_task(attend(command))
    for _ in range(turns):
        await asyncio.sleep(0)
    if opening.cancel():
        with pytest.raises(asyncio.CancelledError):
            await opening
    else:
        await (await opening).close()
    assert command.is_closed
    for each in command.theirs:
        with each:
            each.settimeout(10)
            # The transports close their sockets in the next iteration of the event loop.
            await asyncio.sleep(0)
            assert each.recv(1) == b""

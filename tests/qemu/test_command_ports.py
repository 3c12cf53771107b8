# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests callers that wait for the ports of a command, in a machine whose guest never opens its ports."""

import asyncio
from pathlib import Path

import pytest

from tests.machines import idle_machine
from vmspawn.errors import NotConnected

DEADLINE = 60.0


@pytest.mark.asyncio
async def test_a_caller_that_gives_up_is_forgotten_and_the_others_are_woken_at_the_end(
    qemu: str, tmp_path: Path
) -> None:
    async with idle_machine(qemu, tmp_path) as machine:
        streams = machine._inside.commands._streams
        given_up, *others = [asyncio.create_task(streams.take()) for _ in range(3)]
        await asyncio.sleep(0)
        assert len(streams._waiting) == 3
        given_up.cancel()
        await asyncio.wait({given_up})
        assert len(streams._waiting) == 2
        machine._inside.close()
        for each in others:
            with pytest.raises(NotConnected, match="the machine ended"):
                await asyncio.wait_for(each, DEADLINE)
        with pytest.raises(NotConnected):
            await asyncio.wait_for(streams.take(), DEADLINE)

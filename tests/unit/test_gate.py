# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the gate, which many tasks pass together, or one task alone."""

import asyncio

import pytest

from vmspawn.aio.gate import Gate
from vmspawn.errors import Timeout


async def test_a_lone_task_waits_for_those_inside_and_later_ones_wait() -> None:
    gate, order, leave = Gate(), [], asyncio.Event()

    async def inside() -> None:
        async with gate.together():
            order.append("inside")
            await leave.wait()
            order.append("left")

    async def alone() -> None:
        async with gate.alone(timeout=30):
            order.append("alone")

    async def later() -> None:
        async with gate.together():
            order.append("later")

    tasks = []
    for work in (inside, alone, later):
        tasks.append(asyncio.create_task(work()))
        await asyncio.sleep(0)
    leave.set()
    await asyncio.gather(*tasks)
    assert order == ["inside", "left", "alone", "later"]


async def test_a_task_that_gives_up_waiting_lets_other_tasks_continue() -> None:
    gate = Gate()
    async with gate.together():
        with pytest.raises(Timeout, match="change of the machine's devices has not ended within 0 s"):
            async with gate.alone(timeout=0):
                pass
        async with asyncio.timeout(30), gate.together():
            pass


async def test_lone_tasks_pass_one_after_the_other() -> None:
    gate, inside = Gate(), 0

    async def alone() -> None:
        nonlocal inside
        async with gate.alone(timeout=30):
            inside += 1
            assert inside == 1
            await asyncio.sleep(0)
            inside -= 1

    await asyncio.gather(*(alone() for _ in range(5)))

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Waits until conditions of a machine hold. The manager checks some of them, the client the others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from ..errors import MachineEnded, Timeout
from ..inside import conditions
from ..inside.conditions import OF_CLIENT, Condition, Missing
from ..machine.ending import End
from .console import Console

#: The default timeout for all conditions, in seconds.
WAIT_TIMEOUT = 120.0

#: Waits until conditions hold, and returns the conditions that do not hold after a number of seconds.
OfManager = Callable[[Sequence[Condition], float], Awaitable[Sequence[Missing]]]


async def wait_for(
    machine: str,
    texts: Sequence[str],
    timeout: float,
    *,
    of_manager: OfManager,
    console: Callable[[], Console],
    end: Callable[[], Awaitable[End]],
) -> None:
    """Wait until all conditions hold. Raises Timeout, MachineEnded, UsageError, or the manager's error."""
    wanted = [conditions.parse(each) for each in texts]
    ours = [each for each in wanted if each.kind in OF_CLIENT]
    theirs = [each for each in wanted if each.kind not in OF_CLIENT]
    waits: list[Awaitable[Sequence[Missing]]] = [_one(each, timeout, console, end) for each in ours]
    if theirs:
        waits.append(of_manager(theirs, timeout))
    missing = [each for found in await _all(waits) for each in found]
    if missing:
        raise Timeout(f"machine {machine}: timed out waiting for {', '.join(map(str, missing))}")


async def _all(waits: Sequence[Awaitable[Sequence[Missing]]]) -> list[Sequence[Missing]]:
    """Wait for all; the first that fails cancels the others."""
    tasks = [asyncio.create_task(_awaited(each)) for each in waits]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


async def _awaited(wait: Awaitable[Sequence[Missing]]) -> Sequence[Missing]:
    return await wait


async def _one(
    condition: Condition, timeout: float, console: Callable[[], Console], end: Callable[[], Awaitable[End]]
) -> Sequence[Missing]:
    try:
        async with asyncio.timeout(timeout):
            if condition.kind == "off":
                await end()
            else:
                await _until_shown(condition, console(), end)
    except TimeoutError:
        return [Missing(str(condition), _why(condition, console))]
    return []


def _why(condition: Condition, console: Callable[[], Console]) -> str:
    if condition.kind == "off":
        return "it still runs"
    lines = console().last_lines(1)
    return f"the last line is: {lines[0]}" if lines else "it is empty"


async def _until_shown(condition: Condition, console: Console, end: Callable[[], Awaitable[End]]) -> None:
    if not await console.shows(condition.value):
        raise MachineEnded(f"{(await end()).message} before {condition}")

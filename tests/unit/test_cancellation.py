# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that work is cancelled only where it allows cancellation, and that callers wait for their threads."""

import asyncio
import threading

import pytest

from vmspawn.aio.cancellation import Cancellation
from vmspawn.aio.programs import check_cancelled
from vmspawn.aio.threads import run_cancellable


async def test_a_cancellation_waits_for_work_that_does_not_allow_it() -> None:
    cancellation, begun, go_on = Cancellation(), asyncio.Event(), asyncio.Event()
    steps = []

    async def work() -> None:
        begun.set()
        await go_on.wait()
        steps.append("past it")
        with cancellation.allowed():
            steps.append("allowed")

    task = asyncio.create_task(cancellation.run(work()))
    await begun.wait()
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert steps == ["past it"]


async def test_an_await_that_allows_cancellation_is_cancelled_at_once_and_cleaned_up() -> None:
    cancellation, begun, cleaned = Cancellation(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        try:
            with cancellation.allowed():
                begun.set()
                await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.set()

    task = asyncio.create_task(cancellation.run(work()))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaned.is_set()


async def test_the_caller_gets_results_and_errors() -> None:
    async def work() -> int:
        return 5

    async def fail() -> None:
        raise ValueError("no")

    assert await Cancellation().run(work()) == 5
    with pytest.raises(ValueError, match="no"):
        await Cancellation().run(fail())


async def test_a_thread_that_checks_is_cancelled_and_the_result_of_a_thread_that_does_not_is_undone() -> None:
    begun, go_on = threading.Event(), threading.Event()
    undone: list[int] = []

    def look() -> int:
        begun.set()
        go_on.wait(10)
        check_cancelled()
        raise AssertionError("it was not cancelled")

    def succeed() -> int:
        begun.set()
        go_on.wait(10)
        return 7

    for call in (look, succeed):
        begun.clear()
        go_on.clear()
        task = asyncio.create_task(run_cancellable(call, undo=undone.append))
        await asyncio.to_thread(begun.wait, 10)
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert undone == [7]

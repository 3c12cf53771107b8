# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs blocking calls in worker threads, such as calls that open or read a file while its storage hangs."""

from __future__ import annotations

import asyncio

# Otherwise asyncio imports this module for the first thread. That import fails in a process without free descriptors.
import concurrent.futures.thread  # noqa: F401
import contextlib
from collections.abc import Callable
from typing import TypeVar

from .programs import CANCELLER, Canceller

_T = TypeVar("_T")


async def open_in_thread(
    open_it: Callable[[], _T], close: Callable[[_T], None], *, on_no_thread: Callable[[], None] = lambda: None
) -> _T:
    """Call `open_it` in a worker thread, and return its result. Raises its errors.

    The thread cannot be stopped. If the call is cancelled, the file is closed as soon as it is open. If no thread can
    be started, `on_no_thread` is called instead of `open_it`.
    """
    try:
        work = asyncio.get_running_loop().run_in_executor(None, open_it)
    except BaseException:
        on_no_thread()
        raise

    def close_late(done: asyncio.Future[_T]) -> None:
        if not done.cancelled() and done.exception() is None:
            close(done.result())

    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        work.add_done_callback(close_late)
        raise


async def run_and_close(call: Callable[[], _T], close: Callable[[], None]) -> _T:
    """Run `call` in a worker thread, and return its result. Raises its errors.

    A thread cannot be stopped: after a cancellation, `call` still runs to its end. `close` is called after `call` has
    ended, or at once if no thread can be started.
    """
    closing = contextlib.ExitStack()
    closing.callback(close)

    def work() -> _T:
        with closing:
            return call()

    try:
        running = asyncio.get_running_loop().run_in_executor(None, work)
    except BaseException:
        closing.close()
        raise
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        # No caller is left to get the exception of `call`.
        running.add_done_callback(lambda done: done.cancelled() or done.exception())
        raise


async def run_cancellable(call: Callable[[], _T], *, undo: Callable[[_T], None] | None = None) -> _T:
    """Run `call` in a worker thread, and return its result. Raises its errors.

    After a cancellation, `programs.check_cancelled` raises Cancelled in the thread, and a program that the thread has
    started with `programs.run` is killed. This function then waits for the end of `call`. If `call` succeeded
    nevertheless, `undo` is called with the result, in a thread.
    """
    canceller = Canceller()

    def run() -> _T:
        CANCELLER.set(canceller)
        return call()

    work = asyncio.create_task(asyncio.to_thread(run))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        canceller.cancel()
        await _until_done(work)
        if work.exception() is None and undo is not None:
            await asyncio.to_thread(undo, work.result())
        raise


async def _until_done(work: asyncio.Task[_T]) -> None:
    """Wait for work that is about to end, even if this call is cancelled several times."""
    while not work.done():
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError:
            continue

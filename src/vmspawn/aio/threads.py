# SPDX-License-Identifier: LGPL-2.1-or-later
"""Opens and reads files in threads, because both calls block while the storage hangs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


async def open_in_thread(open_it: Callable[[], _T], close: Callable[[_T], None]) -> _T:
    """Call `open_it` in a worker thread, and return its result. Raises its errors.

    The thread cannot be stopped. If the call is cancelled, the file is closed as soon as it is open.
    """
    work = asyncio.get_running_loop().run_in_executor(None, open_it)

    def close_late(done: asyncio.Future[_T]) -> None:
        if not done.cancelled() and done.exception() is None:
            close(done.result())

    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        work.add_done_callback(close_late)
        raise


async def run_and_close(call: Callable[[], _T], close: Callable[[], None]) -> _T:
    """Return what `call` returns in a worker thread. Raises what it raises.

    A thread cannot be stopped: if this is cancelled, `call` runs to its end. `close` is called after it, or at once if
    no thread can be started.
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
        # Nobody is left to see its exception.
        running.add_done_callback(lambda done: done.cancelled() or done.exception())
        raise

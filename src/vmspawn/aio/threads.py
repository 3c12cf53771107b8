# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open files in threads, for open(2) blocks for as long as the storage below hangs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


async def open_in_thread(open_it: Callable[[], _T], close: Callable[[_T], None]) -> _T:
    """Return what `open_it` opens in a worker thread. Raises what it raises.

    A thread that opens a file cannot be stopped. If this is cancelled, the file is closed as soon as it is open.
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

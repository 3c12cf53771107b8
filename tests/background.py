# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs an event loop for tests that are not coroutines."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


class Background:
    """An event loop in a separate thread. Use it as a context manager."""

    def __init__(self, deadline: float) -> None:
        """Make a loop. `deadline` is the timeout of each `wait`, in seconds."""
        self._deadline = deadline
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine on the loop and return its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(self._deadline)

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(self._deadline)
        self._loop.close()

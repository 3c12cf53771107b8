# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ends a machine after the user's time limit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from ..aio.tasks import Tasks


class TimeLimit:
    """Ends a machine a number of seconds after QEMU's start, even if another manager started QEMU."""

    def __init__(self, seconds: float | None, uptime: float, end: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._end = end
        self._tasks = Tasks()
        #: True after the time limit.
        self.is_over = False
        #: The limit, or None.
        self.seconds = seconds
        self._timer = (
            asyncio.get_running_loop().call_later(max(0.0, seconds - uptime), self._over)
            if seconds is not None
            else None
        )

    def _over(self) -> None:
        self.is_over = True
        self._tasks.start(self._end())

    def close(self) -> None:
        """Stop counting: the machine has ended, or belongs to another manager. May be called again."""
        if self._timer is not None:
            self._timer.cancel()

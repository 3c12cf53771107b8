# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs background tasks that outlive their callers, and cancels them after QEMU's end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from ..errors import NotConnected, Timeout

_T = TypeVar("_T")


class Tasks:
    """A machine's background tasks."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Start a task, and keep a reference to it until it is done."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        return task

    async def run(self, work: Coroutine[Any, Any, _T], doing: str, *, timeout: float, hint: str) -> _T:
        """Start a task and return its result. Raises Timeout after `timeout` seconds; the task continues."""
        task = self.start(work)
        await asyncio.wait({task}, timeout=timeout)
        if not task.done():
            raise Timeout(f"{doing} has taken {timeout:g} s already and continues", hint=hint)
        return self.result(task)

    @staticmethod
    def result(task: asyncio.Task[_T]) -> _T:
        """Return the result of a completed task. Raises NotConnected if `cancel` has cancelled it."""
        if task.cancelled():
            raise NotConnected("the machine ended")
        return task.result()

    def _on_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        # Read the error, so that asyncio does not log it. The manager itself reports the end of QEMU.
        if not task.cancelled():
            task.exception()

    def cancel(self) -> None:
        """Cancel all tasks after QEMU's end."""
        for task in tuple(self._tasks):
            task.cancel()

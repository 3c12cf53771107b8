# SPDX-License-Identifier: LGPL-2.1-or-later
"""Cancels a task only where its work can be undone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

_T = TypeVar("_T")


class Cancellation:
    """Runs one task, and delays its cancellation until the task allows it."""

    def __init__(self) -> None:
        self._is_wanted = False
        self._is_allowed = False

    async def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run the work in a task, and return its result. Raises its errors.

        If the caller is cancelled, the work is cancelled where it allows that. `run` waits for the end of the work.
        """
        task = asyncio.create_task(work)
        while True:
            try:
                result = await asyncio.shield(task)
            except asyncio.CancelledError:
                if task.done():
                    raise
                self._is_wanted = True
                if self._is_allowed:
                    task.cancel()
            else:
                if self._is_wanted:
                    raise asyncio.CancelledError
                return result

    def check(self) -> None:
        """Raise CancelledError if a cancellation was requested."""
        if self._is_wanted:
            raise asyncio.CancelledError

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Allow the cancellation of the awaits in this context.

        Raises CancelledError if a cancellation was requested already.
        """
        self.check()
        self._is_allowed = True
        try:
            yield
        finally:
            self._is_allowed = False

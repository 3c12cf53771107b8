# SPDX-License-Identifier: LGPL-2.1-or-later
"""Provides a readers-writer lock for tasks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ..errors import Timeout


class Gate:
    """A readers-writer lock: any number of tasks hold it together, or one task holds it alone.

    It prefers writers: tasks that come later wait until the waiting writer is done.
    """

    def __init__(self) -> None:
        self._inside = 0
        self._is_open = asyncio.Event()
        self._is_open.set()
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    @asynccontextmanager
    async def together(self) -> AsyncIterator[None]:
        """Hold the gate together with other tasks. Waits while another task holds it alone, or waits to do so."""
        await self._is_open.wait()
        self._inside += 1
        self._is_empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._is_empty.set()

    @asynccontextmanager
    async def alone(self, *, timeout: float) -> AsyncIterator[None]:
        """Hold the gate alone: keep other tasks out, and wait until the tasks inside have left.

        Raises Timeout after `timeout` seconds.
        """
        while not self._is_open.is_set():
            await self._is_open.wait()
        self._is_open.clear()
        try:
            try:
                async with asyncio.timeout(timeout):
                    await self._is_empty.wait()
            except TimeoutError:
                raise Timeout(
                    f"another change of the machine's devices has not ended within {timeout:g} s",
                    hint="try again when it has ended",
                ) from None
            yield
        finally:
            self._is_open.set()

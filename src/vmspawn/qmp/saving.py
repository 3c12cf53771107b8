# SPDX-License-Identifier: LGPL-2.1-or-later
"""Delays the plug-in of devices that QEMU cannot save, while a QMP session is about to save the machine's state.

Once a migration has begun, QEMU itself refuses `device_add` (docs/qemu.md, "Saving and loading state").
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ..errors import Timeout

#: Seconds that an attach waits for sessions that are about to save the state.
_TIMEOUT = 10.0


class Saving:
    """Keeps two sides apart: sessions that are about to save the state, and devices about to be plugged in."""

    def __init__(self) -> None:
        self._savers = 0
        self._coming = 0
        self._is_free = asyncio.Event()
        self._is_free.set()

    @property
    def is_device_coming(self) -> bool:
        """True while a device that QEMU cannot save is being plugged in."""
        return bool(self._coming)

    def begin(self) -> None:
        """Mark that a session begins a command that may save the state."""
        self._savers += 1
        self._is_free.clear()

    def end(self) -> None:
        """Mark that a command for which `begin` was called has ended, or was refused."""
        self._savers -= 1
        if not self._savers:
            self._is_free.set()

    @asynccontextmanager
    async def device_comes(self) -> AsyncIterator[None]:
        """Wait until no session is about to save. Raises Timeout."""
        try:
            async with asyncio.timeout(_TIMEOUT):
                while self._savers:
                    await self._is_free.wait()
        except TimeoutError:
            raise Timeout(
                f"a QMP session is about to save the machine's state, and has not begun within {_TIMEOUT:g} s",
                hint="try again",
            ) from None
        self._coming += 1
        try:
            yield
        finally:
            self._coming -= 1

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Watches a machine's helpers, and ends the machine if one of them dies."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from ..aio.waiting import first_of
from ..host.process import Process
from .helper import Helper

#: Seconds to wait for QEMU's exit after a helper's failure. Both may have been killed, and either exit may be noticed
#: first.
_GRACE = 2.0

#: Seconds to wait for QEMU's exit after a helper's exit with status 0: helpers do that when QEMU has disconnected. On a
#: busy host, QEMU then needs some seconds to exit.
_GRACE_AFTER_DISCONNECT = 15.0


class Watch:
    """The helpers of one running machine."""

    def __init__(self, helpers: Sequence[Helper]) -> None:
        self._watched = [(helper, Process(helper.pid)) for helper in helpers if helper.pid]
        #: A description of a helper that ended while there was no manager, or an empty string.
        self.lost = next((each.describe("ended while there was no manager") for each in helpers if not each.pid), "")

    async def until_ended(self, qemu: Process, terminate: Callable[[], Awaitable[None]]) -> str:
        """Wait until QEMU has ended. Returns an empty string.

        If a helper dies first, or has ended before the adoption, ends QEMU with `terminate` and returns a description
        of the helper's end.
        """
        if self.lost:
            await asyncio.gather(terminate(), qemu.ended.wait())
            return self.lost
        if not self._watched:
            await qemu.ended.wait()
            return ""
        await first_of(qemu.ended, *(process.ended for _, process in self._watched))
        await first_of(qemu.ended, timeout=_GRACE if self.failed() else _GRACE_AFTER_DISCONNECT)
        if qemu.ended.is_set():
            return ""
        lost = self._describe(lambda process: process.ended.is_set())
        await asyncio.gather(terminate(), qemu.ended.wait())
        return lost

    def failed(self) -> str:
        """Describe the end of a helper whose status is not 0 or not known. Returns an empty string if there is none."""
        return self._describe(lambda process: process.ended.is_set() and process.status != 0)

    def _describe(self, blamed: Callable[[Process], bool]) -> str:
        return next((each.describe(process.describe_end()) for each, process in self._watched if blamed(process)), "")

    def leave(self) -> None:
        """Stop watching and leave the helpers running, because QEMU keeps running."""
        for _, process in self._watched:
            process.close()
        self._watched = []

    async def close(self) -> None:
        """Kill the helpers after QEMU has ended, and wait for them."""
        for helper, process in self._watched:
            process.kill()
            await process.ended.wait()
            helper.pid = 0
        self._watched = []

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Queues the events of a monitor for readers that read at their own pace."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

#: Events that are queued for a reader. QEMU sends a handful a second at the most.
EVENT_QUEUE_MAX = 4096


class Event(NamedTuple):
    """An event as QEMU sent it; `data` is None where it carried none.

    `timestamp` has QEMU's `seconds` and `microseconds`; our own events have none.
    """

    name: str
    data: dict[str, object] | None
    timestamp: dict[str, int] | None = None


class EventStream:
    """The events from now on, for one reader. Iterate over it; it ends when QEMU is gone or `close` is called."""

    def __init__(self, on_close: Callable[[EventStream], None]) -> None:
        """`on_close` is called with the stream when it needs no more events."""
        self._on_close = on_close
        self._queue: deque[Event] = deque()
        self._wake: asyncio.Future[None] | None = None
        self._ended = False
        #: Whether the reader was so slow that events were dropped; the stream ends then.
        self.overrun = False

    def put(self, event: Event) -> None:
        """Append an event. The stream of a reader with EVENT_QUEUE_MAX unread events ends."""
        if self._ended:
            return
        if len(self._queue) >= EVENT_QUEUE_MAX:
            self.overrun = True
            self.close()
            return
        self._queue.append(event)
        self._notify()

    def close(self) -> None:
        """End the stream; what is queued can still be read."""
        self._ended = True
        self._on_close(self)
        self._notify()

    def _notify(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> Event:
        while not self._queue:
            if self._ended:
                raise StopAsyncIteration
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        return self._queue.popleft()

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Queues a monitor's events for readers, each of which reads at its own speed."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, Callable
from typing import NamedTuple

#: The maximum number of events that are queued for a reader. QEMU sends a few per second.
EVENT_QUEUE_MAX = 4096


class Event(NamedTuple):
    """An event of QEMU or of vmspawn. `data` is None if the event has none.

        event = await machine.events.wait("DEVICE_DELETED")
        print(event.name, event.data)

    `timestamp` has QEMU's `seconds` and `microseconds`, and is None for vmspawn's events.
    """

    name: str
    data: dict[str, object] | None
    timestamp: dict[str, int] | None = None


class EventStream:
    """An asynchronous iterator over events, for one reader. It ends after QEMU's exit, or after `close`."""

    def __init__(self, on_close: Callable[[EventStream], None]) -> None:
        """Open the stream. `on_close` is called with the stream when the stream needs no more events."""
        self._on_close = on_close
        self._queue: deque[Event] = deque()
        self._wake: asyncio.Future[None] | None = None
        self._has_ended = False
        #: True if the stream has ended because the reader was too slow, and events were lost.
        self.is_overrun = False

    def put(self, event: Event) -> None:
        """Append an event. If EVENT_QUEUE_MAX events are unread, the stream ends instead."""
        if self._has_ended:
            return
        if len(self._queue) >= EVENT_QUEUE_MAX:
            self.is_overrun = True
            self.close()
            return
        self._queue.append(event)
        self._notify()

    def close(self) -> None:
        """End the stream. Queued events can still be read."""
        self._has_ended = True
        self._on_close(self)
        self._notify()

    def _notify(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> Event:
        while not self._queue:
            if self._has_ended:
                raise StopAsyncIteration
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        return self._queue.popleft()

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def first_event(events: AsyncIterable[Event], *names: str) -> Event | None:
    """Return the next event with one of the names, or None if the events end first."""
    async for event in events:
        if event.name in names:
            return event
    return None

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lets programs wait for a machine's events, including past ones, or iterate over them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Generic, TypeAlias, TypeVar

from ..errors import EventsLost, MachineEnded, NotConnected, Timeout, VmspawnError
from ..machine.ending import MACHINE_ENDED
from ..qmp.events import Event

#: The number of events that are kept for `wait(since=…)`.
REMEMBERED_MAX = 4096

#: The default timeout of `wait`, in seconds.
EVENT_TIMEOUT = 30.0

#: Events that an error shows.
_SHOWN = 10

Where: TypeAlias = Mapping[str, object] | Callable[[Event], bool]

_Stream = TypeVar("_Stream", bound=AbstractAsyncContextManager[AsyncIterator[Event]], covariant=True)


class Record:
    """Numbers a machine's events, and keeps the last ones for callers that wait."""

    def __init__(self, machine: str) -> None:
        self.machine = machine
        self.events: deque[Event] = deque(maxlen=REMEMBERED_MAX)
        #: The number of events so far.
        self.count = 0
        #: True when no more events will come.
        self.ended = False
        self._changed = asyncio.Event()

    def put(self, event: Event) -> None:
        """Add an event. MachineEnded is the last one."""
        self.events.append(event)
        self.count += 1
        if event.name == MACHINE_ENDED:
            self.ended = True
        self._notify()

    def end(self) -> None:
        """Note that no more events will come, and wake the waiting callers."""
        self.ended = True
        self._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def since(self, number: int) -> list[Event]:
        """Return the events from that number on. Raises EventsLost if one of them is no longer kept."""
        first = self.count - len(self.events)
        if number < first:
            what = f"event {number} of machine {self.machine} is no longer kept"
            raise EventsLost(f"{what}: only the last {REMEMBERED_MAX} events are kept")
        return list(self.events)[number - first :]

    async def next_change(self) -> None:
        """Wait for the next event, or the end of events."""
        await self._changed.wait()


class Events(Generic[_Stream]):
    """The events of QEMU and vmspawn (such as StorageAttached); MachineEnded is the last one.

        mark = machine.events.mark
        await machine.detach("data", timeout=60)
        event = await machine.events.wait("StorageDetached", where={"name": "data"}, since=mark, timeout=10)

    Calling the object returns a stream of the events from now on:

        async with machine.events() as stream:
            async for event in stream: ...
    """

    def __init__(self, record: Record, subscribe: Callable[[], _Stream]) -> None:
        self._record = record
        self._subscribe = subscribe

    def __repr__(self) -> str:
        return f"<Events of {self._record.machine!r}: {self._record.count} so far>"

    def __call__(self) -> _Stream:
        """Return a stream of the events from now on, for `async with`."""
        return self._subscribe()

    @property
    def mark(self) -> int:
        """The number of events so far, for `wait(since=…)`."""
        return self._record.count

    @property
    def recent(self) -> tuple[Event, ...]:
        """The last 4096 events at most, the oldest first.

        They begin with the machine's start, or with `connect` if another process manages the machine.
        """
        return tuple(self._record.events)

    async def wait(
        self, *names: str, where: Where | None = None, timeout: float | None = EVENT_TIMEOUT, since: int | None = None
    ) -> Event:
        """Wait for an event with one of these names, or for any event without names, and return it.

        `where` is a part of the event's data, such as `{"name": "disk0"}`, or a function of the event. `since` is a
        `mark`: events after it are searched first; 0 stands for the first event. `timeout` is in seconds; None waits
        for ever.

        Raises Timeout, MachineEnded if the machine ends first, NotConnected, or EventsLost if events since the mark
        are no longer kept.
        """
        number = self._record.count if since is None else since
        try:
            async with asyncio.timeout(timeout):
                return await self._find(number, names, where)
        except TimeoutError:
            raise self._noted(Timeout(f"{_described(names)} did not come within {timeout:g} s")) from None

    async def _find(self, number: int, names: tuple[str, ...], where: Where | None) -> Event:
        record = self._record
        while True:
            for event in record.since(number):
                number += 1
                if (not names or event.name in names) and _matches(event, where):
                    return event
            if record.ended:
                raise self._noted(self._end_before(_described(names)))
            await record.next_change()

    def _end_before(self, what: str) -> VmspawnError:
        events = self._record.events
        if events and events[-1].name == MACHINE_ENDED:
            return MachineEnded(f"machine {self._record.machine} ended before {what} came")
        return NotConnected(f"the connection to machine {self._record.machine} was closed before {what} came")

    def _noted(self, error: VmspawnError) -> VmspawnError:
        lines = [f"    {describe(event)}" for event in self.recent[-_SHOWN:]] or ["    none"]
        error.add_note("\n".join(("the last events:", *lines)))
        return error


def describe(event: Event) -> str:
    """Return an event as one line of text."""
    words = (
        f"{name}={value!r}" if isinstance(value, dict | list) else f"{name}={value}"
        for name, value in (event.data or {}).items()
    )
    return " ".join((event.name, *words))


def _described(names: tuple[str, ...]) -> str:
    return " or ".join(names) or "an event"


def _matches(event: Event, where: Where | None) -> bool:
    if where is None:
        return True
    return where(event) if callable(where) else _contains(event.data or {}, where)


def _contains(data: object, part: object) -> bool:
    """Return whether `data` contains `part`, comparing dictionaries at any depth."""
    if isinstance(part, Mapping):
        return isinstance(data, Mapping) and all(
            name in data and _contains(data[name], each) for name, each in part.items()
        )
    return data == part

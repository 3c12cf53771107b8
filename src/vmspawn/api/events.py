# SPDX-License-Identifier: LGPL-2.1-or-later
"""A machine's events for programs: wait for one, also if it has come already, or iterate over them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Generic, TypeAlias, TypeVar

from ..errors import EventsLost, MachineEnded, NotConnected, Timeout, VmspawnError
from ..machine.ending import MACHINE_ENDED
from ..qmp.events import Event

#: Events that are remembered for `wait(since=…)`.
REMEMBERED_MAX = 4096

#: Seconds that `wait` waits if its caller names no other time.
EVENT_TIMEOUT = 30.0

#: Events that an error shows.
_SHOWN = 10

Where: TypeAlias = Mapping[str, object] | Callable[[Event], bool]

_Stream = TypeVar("_Stream", bound=AbstractAsyncContextManager[AsyncIterator[Event]], covariant=True)


class Record:
    """The last events of a machine, with numbers, for those that wait for one."""

    def __init__(self, machine: str) -> None:
        self.machine = machine
        self.events: deque[Event] = deque(maxlen=REMEMBERED_MAX)
        #: The number of events that have come.
        self.count = 0
        #: Whether no more events will come.
        self.ended = False
        self._changed = asyncio.Event()

    def put(self, event: Event) -> None:
        """Enter an event; after MachineEnded no more will come."""
        self.events.append(event)
        self.count += 1
        if event.name == MACHINE_ENDED:
            self.ended = True
        self._notify()

    def end(self) -> None:
        """Let those that wait know that no more will come."""
        self.ended = True
        self._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def since(self, number: int) -> list[Event]:
        """The events from that number on. Raises EventsLost if one of them is forgotten."""
        first = self.count - len(self.events)
        if number < first:
            what = f"event {number} of machine {self.machine} is forgotten"
            raise EventsLost(f"{what}: the last {REMEMBERED_MAX} are remembered")
        return list(self.events)[number - first :]

    async def next_change(self) -> None:
        """Wait until an event comes, or the end."""
        await self._changed.wait()


class Events(Generic[_Stream]):
    """A machine's events: QEMU's, ours such as StorageAttached, and MachineEnded as the last one.

        mark = machine.events.mark
        await machine.detach("data", timeout=60)
        event = await machine.events.wait("DEVICE_DELETED", where={"device": "data"}, since=mark, timeout=10)

    Called, it gives a stream of the events from now on, to iterate over:

        async with machine.events() as stream:
            async for event in stream: ...
    """

    def __init__(self, record: Record, subscribe: Callable[[], _Stream]) -> None:
        self._record = record
        self._subscribe = subscribe

    def __repr__(self) -> str:
        return f"<Events of {self._record.machine!r}: {self._record.count} so far>"

    def __call__(self) -> _Stream:
        """Return a stream of the events from now on; use it in `async with`."""
        return self._subscribe()

    @property
    def mark(self) -> int:
        """The number of events that have come by now, for `wait(since=…)`."""
        return self._record.count

    @property
    def recent(self) -> tuple[Event, ...]:
        """The last events, the oldest first; at most 4096 are remembered.

        They begin with the machine's start, or with `connect` if another process manages the machine.
        """
        return tuple(self._record.events)

    async def wait(
        self, *names: str, where: Where | None = None, timeout: float | None = EVENT_TIMEOUT, since: int | None = None
    ) -> Event:
        """Wait for an event of one of these names, or of any name if there are none, and return it.

        `where` is a part of its data, such as `{"device": "disk0"}`, or a function of the event. `since` is a `mark`:
        events that came after it count as well, and 0 stands for all that are remembered. `timeout` is in seconds;
        None waits for ever.

        Raises Timeout, MachineEnded if the machine ends before, NotConnected, or EventsLost if events since the mark
        are forgotten.
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
    """An event as one line."""
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
    """Whether `data` has all that `part` has, in dictionaries at any depth."""
    if isinstance(part, Mapping):
        return isinstance(data, Mapping) and all(
            name in data and _contains(data[name], each) for name, each in part.items()
        )
    return data == part

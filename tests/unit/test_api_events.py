# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests waiting for events that a test records: later, earlier and discarded events."""

import asyncio

import pytest

from vmspawn.api.events import REMEMBERED_MAX, Events, Record
from vmspawn.errors import EventsLost, MachineEnded, Timeout
from vmspawn.machine.ending import End, MachineEvents
from vmspawn.qmp.events import Event


def record_of(*names: str) -> tuple[Record, Events[MachineEvents]]:
    record = Record("box")

    def stream() -> MachineEvents:
        raise NotImplementedError

    for number, name in enumerate(names):
        record.put(Event(name, {"number": number}))
    return record, Events(record, stream)


async def test_only_later_events_count_by_default() -> None:
    record, events = record_of("STOP", "RESUME")
    waiting = asyncio.create_task(events.wait("STOP"))
    await asyncio.sleep(0)
    record.put(Event("STOP", {"number": 2}))
    assert (await waiting).data == {"number": 2}
    assert (await events.wait("STOP", since=0)).data == {"number": 0}
    assert (await events.wait("STOP", since=1)).data == {"number": 2}


async def test_a_mark_is_a_place_between_events() -> None:
    record, events = record_of("STOP")
    mark = events.mark
    record.put(Event("STOP", {"number": 1}))
    assert (await events.wait("STOP", "RESUME", since=mark)).data == {"number": 1}
    assert [event.name for event in events.recent] == ["STOP", "STOP"]


async def test_the_argument_where_is_a_part_of_the_data_or_a_function() -> None:
    record, events = record_of("A")
    record.put(Event("A", {"device": {"id": "x", "bus": "y"}}))
    record.put(Event("A", None))
    assert (await events.wait(where={"device": {"id": "x"}}, since=0)).data == {"device": {"id": "x", "bus": "y"}}
    assert (await events.wait(where=lambda event: event.data is None, since=0)).data is None
    with pytest.raises(Timeout):
        await events.wait("A", where={"device": {"id": "z"}}, since=0, timeout=0)


async def test_a_timeout_and_the_end_show_the_last_events() -> None:
    record, events = record_of("STOP")
    with pytest.raises(Timeout, match=r"^RESET or STOP did not come within 0 s(\n|$)") as caught:
        await events.wait("RESET", "STOP", timeout=0)
    assert caught.value.__notes__ == ["the last events:\n    STOP number=0"]
    waiting = asyncio.create_task(events.wait("RESET"))
    await asyncio.sleep(0)
    record.put(End.terminated().event())
    with pytest.raises(MachineEnded, match=r"^machine box ended before RESET came(\n|$)"):
        await waiting
    assert (await events.wait("MachineEnded", since=0)).data == End.terminated()._asdict()


async def test_a_discarded_event_raises_an_error() -> None:
    record, events = record_of()
    for _ in range(REMEMBERED_MAX + 1):
        record.put(Event("A", None))
    with pytest.raises(EventsLost, match=r"^event 0 of machine box is no longer kept"):
        await events.wait("B", since=0)
    with pytest.raises(Timeout):
        await events.wait("B", since=1, timeout=0)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""One drive that is, is becoming or is ceasing to be attached, with the journal of its steps."""

from __future__ import annotations

import asyncio
import enum
from dataclasses import dataclass, field
from typing import Any

from ..waiting import first_of
from . import buses
from .drive import Backing, Drive
from .nodes import Identifiers
from .ports import Place


class State(enum.StrEnum):
    """Where an attachment stands."""

    ATTACHING = "attaching"
    ATTACHED = "attached"
    DETACHING = "detaching"


@dataclass(slots=True, eq=False)
class Attachment:
    """A drive and all that taking it apart again needs, chosen before the first step.

    `done` is the journal: the names of the steps that were begun and not undone, oldest first. `backing.fd` is ours
    until QEMU has it, and -1 from then on.
    """

    drive: Drive
    identifiers: Identifiers
    place: Place
    backing: Backing
    format: str
    serial: str
    boot: bool = False
    done: list[str] = field(default_factory=list)
    state: State = State.ATTACHING
    #: What QEMU last said to a request for removal that did not go through at once; for people.
    answer: str = ""
    #: How often the guest was asked to let go.
    requests: int = 0
    #: Set when QEMU says that the device is gone.
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    #: Set when somebody asks again for a removal that is under way: it is tried again at once.
    nudge: asyncio.Event = field(default_factory=asyncio.Event)
    #: Set when attaching has succeeded or its failure has been handed to the clean-up.
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    #: The one task that takes the drive apart, once there is one.
    unwinding: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """The name that the user gave the drive."""
        return self.drive.name

    @property
    def by_id(self) -> str:
        """The drive's stable path in the guest."""
        return buses.by_id_path(self.drive.bus, self.serial)

    async def wait_for_news(self, seconds: float) -> None:
        """Wait until the device is gone, somebody asks again, or the time has passed."""
        await first_of(self.gone, self.nudge, timeout=seconds)
        self.nudge.clear()

    def close_backing(self) -> None:
        """Close our descriptor of the image, if we still have it."""
        if self.backing.fd >= 0:
            self.backing.close()
            self.backing = self.backing._replace(fd=-1)

    def to_state(self) -> dict[str, Any]:
        """What another process would need to take the drive over, as JSON values."""
        return {
            "name": self.name,
            "path": self.drive.path,
            "bus": self.drive.bus,
            "format": self.format,
            "serial": self.serial,
            "boot": self.boot,
            "number": self.identifiers.number,
            "place": list(self.place),
            "writable": self.backing.writable,
            "block": self.backing.block,
            "identity": list(self.backing.identity),
            "state": self.state.value,
            "done": list(self.done),
        }

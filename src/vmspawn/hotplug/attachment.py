# SPDX-License-Identifier: LGPL-2.1-or-later
"""Something that is plugged into a running machine, is being plugged in, or is being taken out."""

from __future__ import annotations

import asyncio
import enum
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from ..aio.waiting import first_of
from ..errors import VmspawnError
from .step import DEVICE, Step


class State(enum.StrEnum):
    """Where an attachment stands."""

    ATTACHING = "attaching"
    ATTACHED = "attached"
    DETACHING = "detaching"


class EventNames(NamedTuple):
    """The events that tell clients of one kind of attachment."""

    attached: str
    detaching: str
    detached: str


@dataclass(slots=True, eq=False)
class Removal:
    """What is known of a removal that is under way, for people."""

    #: When it began, by the monotonic clock.
    since: float = field(default_factory=time.monotonic)
    #: How often the guest was asked to release the device.
    requests: int = 0
    #: How often QEMU has refused to undo the other steps.
    refusals: int = 0
    #: QEMU's last answer to a request that did not succeed at once.
    answer: str = ""

    @property
    def seconds(self) -> float:
        """How long it has been under way."""
        return time.monotonic() - self.since


@dataclass(slots=True, eq=False, kw_only=True, repr=False)
class Attachment(ABC):
    """A device with all that it stands on, as a list of steps.

    The device is the last step and depends on all others, so it fails if any of them fails. Everything that the undo
    needs is chosen before the first step.
    """

    #: The section of the journal.
    kind: ClassVar[str]
    #: None for what users do not see.
    events: ClassVar[EventNames | None] = None

    #: Whether QEMU was started with it.
    boot: bool = False
    #: The journal: the names of the steps that were begun and not undone, in their order.
    done: list[str] = field(default_factory=list)
    state: State = State.ATTACHING
    removal: Removal | None = None
    #: Held by whoever changes the attachment, and by each undo but that of the device.
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    #: Set when QEMU reports that the device is gone.
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    #: Set when somebody asks again for a removal that is under way: it is tried again at once.
    nudge: asyncio.Event = field(default_factory=asyncio.Event)
    #: Set when attaching has succeeded, or its failure has been handed to the clean-up.
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    #: Whether attaching has failed, or was cancelled.
    has_failed: bool = False
    #: The one task that takes the attachment apart, once there is one.
    unwinding: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}, {self.state.value}>"

    @property
    @abstractmethod
    def name(self) -> str:
        """The name among those of its kind."""

    @property
    @abstractmethod
    def device(self) -> str:
        """The device's id in QEMU."""

    @abstractmethod
    def steps(self) -> Sequence[Step]:
        """All steps that it can have, in their order. The last is `PlugIn`."""

    @abstractmethod
    def to_state(self) -> dict[str, Any]:
        """What another process needs to take it over, as JSON values."""

    @abstractmethod
    def vanished(self) -> VmspawnError:
        """The error of an attach whose device was removed by somebody else meanwhile."""

    @property
    def is_whole(self) -> bool:
        """Whether it is complete if its device is there."""
        return True

    @property
    def still_closing(self) -> str:
        """Why it is still there although its device is gone, for people."""
        return f"QEMU still closes what {self.name} stands on"

    @property
    def not_released(self) -> str:
        """Why its device may still be there, for people."""
        return f"the guest has not let go of {self.name}; it may still be booting, or not know ACPI hot-plug"

    @property
    def has_device(self) -> bool:
        """Whether its device may be there."""
        return DEVICE in self.done

    def close(self) -> None:  # noqa: B027 - most kinds have none
        """Close our own descriptors of it."""

    def plan(self) -> list[Step]:
        """The steps that it needs."""
        return [step for step in self.steps() if step.is_needed]

    def enter_step(self, name: str) -> None:
        """Enter a step in `done`, in the order of the steps."""
        if name not in self.done:
            self.done = [step.name for step in self.steps() if step.name in (*self.done, name)]

    async def wait_for_news(self, seconds: float) -> None:
        """Wait until the device is gone, somebody asks again, or the time has passed."""
        await first_of(self.gone, self.nudge, timeout=seconds)
        self.nudge.clear()

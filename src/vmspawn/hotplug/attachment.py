# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines an attachment: a device that is being plugged into a running machine, is plugged in, or is being removed."""

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
    """The state of an attachment."""

    ATTACHING = "attaching"
    ATTACHED = "attached"
    DETACHING = "detaching"


class EventNames(NamedTuple):
    """The names of the events that report one kind of attachment to clients."""

    attached: str
    detaching: str
    detached: str


@dataclass(slots=True, eq=False)
class Removal:
    """The progress of a removal that is under way, for messages."""

    #: The start of the removal, by the monotonic clock.
    since: float = field(default_factory=time.monotonic)
    #: The number of requests that the guest release the device.
    requests: int = 0
    #: The number of failed attempts to undo the attachment's steps.
    refusals: int = 0
    #: The reason why the last request or attempt failed, or an empty string.
    answer: str = ""
    #: True if an event or an error has reported that the removal is under way.
    is_reported: bool = False

    @property
    def seconds(self) -> float:
        """The duration of the removal so far."""
        return time.monotonic() - self.since


@dataclass(slots=True, eq=False, kw_only=True, repr=False)
class Attachment(ABC):
    """A device and the QEMU objects that it depends on, as a list of steps.

    The device is the last step and depends on all others, so it fails if any of them fails. All values that the undo
    needs are chosen before the first step.
    """

    #: The name of the kind's section in the journal.
    kind: ClassVar[str]
    #: None for a kind that users do not see.
    events: ClassVar[EventNames | None] = None

    #: True if the device cannot be detached while the machine runs. In a copy of a machine, it is false for the devices
    #: that were hot-plugged before the snapshot, although the copy's QEMU was started with them.
    is_boot: bool = False
    #: The names of the steps that were begun and not undone, in order. The journal has them.
    done: list[str] = field(default_factory=list)
    state: State = State.ATTACHING
    removal: Removal | None = None
    #: Held during a change of the attachment, and during each undo except that of the device.
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    #: Set when QEMU reports that the device is removed.
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    #: Set when a removal under way is requested again: the next attempt follows at once.
    nudge: asyncio.Event = field(default_factory=asyncio.Event)
    #: Set when the attach has succeeded, or has failed and its undo has begun.
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    #: True if the attach has failed or was cancelled.
    has_failed: bool = False
    #: The task that undoes all steps; None before the removal begins.
    unwinding: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}, {self.state.value}>"

    @property
    @abstractmethod
    def name(self) -> str:
        """The attachment's name, unique among its kind."""

    @property
    @abstractmethod
    def device(self) -> str:
        """The device's id in QEMU."""

    @abstractmethod
    def steps(self) -> Sequence[Step]:
        """Return all steps that the attachment can have, in order. The last is `PlugIn`."""

    @abstractmethod
    def to_state(self) -> dict[str, Any]:
        """Return the attachment's record for state.json, from which another manager can adopt it."""

    @abstractmethod
    def vanished(self) -> VmspawnError:
        """Return the error of an attach whose device was removed through QMP meanwhile."""

    @property
    def is_whole(self) -> bool:
        """True if the existence of the device proves that the attachment is complete."""
        return True

    @property
    def still_closing(self) -> str:
        """The reason why the attachment still exists although its device is removed."""
        return f"QEMU has not yet removed the objects of {self.name}"

    @property
    def not_released(self) -> str:
        """The likely reason why the device still exists."""
        return f"the guest has not released {self.name}; it may still be booting, or lack ACPI hot-plug"

    @property
    def has_device(self) -> bool:
        """True if the device may exist in QEMU."""
        return DEVICE in self.done

    def close(self) -> None:  # noqa: B027 - most kinds have no descriptors
        """Close the manager's descriptors of the attachment."""

    def plan(self) -> list[Step]:
        """Return the steps that the attachment needs, in order."""
        return [step for step in self.steps() if step.is_needed]

    def enter_step(self, name: str) -> None:
        """Enter a step in `done`, in the order of the steps."""
        if name not in self.done:
            self.done = [step.name for step in self.steps() if step.name in (*self.done, name)]

    async def wait_for_news(self, seconds: float) -> None:
        """Wait until the device is removed, the removal is requested again, or `seconds` have passed."""
        await first_of(self.gone, self.nudge, timeout=seconds)
        self.nudge.clear()

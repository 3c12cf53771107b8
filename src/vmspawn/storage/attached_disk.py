# SPDX-License-Identifier: LGPL-2.1-or-later
"""One disk that is, is becoming or is ceasing to be attached, with the journal of its steps."""

from __future__ import annotations

import asyncio
import enum
import time
from dataclasses import dataclass, field
from typing import Any

from ..aio.waiting import first_of
from ..hotplug.places import Place
from . import buses
from .disk import Disk
from .image import FAULT, Image
from .limits import NO_LIMITS, Limits
from .nodes import Identifiers
from .saved import load_disk, load_identifiers, load_image, load_limits, load_place, save_disk


class State(enum.StrEnum):
    """Where an attachment stands."""

    ATTACHING = "attaching"
    ATTACHED = "attached"
    DETACHING = "detaching"


@dataclass(slots=True, eq=False)
class Removal:
    """What is known of a removal that is under way, for people."""

    #: When it began, by the monotonic clock.
    since: float = field(default_factory=time.monotonic)
    #: How often the guest was asked to let go.
    requests: int = 0
    #: What QEMU last said to a request that did not go through at once.
    answer: str = ""

    @property
    def seconds(self) -> float:
        """For how long it has been under way."""
        return time.monotonic() - self.since


@dataclass(slots=True, eq=False)
class AttachedDisk:
    """A disk and all that taking it apart again needs, chosen before the first step.

    `done` is the journal: the names of the steps that were begun and not undone, in the order of STEPS. `images` has
    the one that the disk stands on, and while it is exchanged the other; an optical drive may have none.
    """

    disk: Disk
    identifiers: Identifiers
    place: Place
    serial: str
    images: list[Image] = field(default_factory=list)
    limits: Limits = NO_LIMITS
    boot: bool = False
    done: list[str] = field(default_factory=list)
    state: State = State.ATTACHING
    removal: Removal | None = None
    #: How many requests of the guest's have failed since this manager has the disk, and what is known of the last.
    failures: int = 0
    last_failure: str = ""
    #: Held by whoever changes the images, and by each step of taking the disk apart but for the guest's.
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    #: Set when QEMU says that the device is gone.
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    #: Set when somebody asks again for a removal that is under way: it is tried again at once.
    nudge: asyncio.Event = field(default_factory=asyncio.Event)
    #: Set when attaching has succeeded or its failure has been handed to the clean-up.
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    #: The one task that takes the disk apart, once there is one.
    unwinding: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """The name that the user gave the disk."""
        return self.disk.name

    @property
    def image(self) -> Image | None:
        """The image that the disk stands on."""
        return self.images[0] if self.images else None

    @property
    def format(self) -> str:
        """The image's format; of a disk without an image, the one that it was attached with."""
        return self.image.format if self.image else self.disk.format or "raw"

    @property
    def read_only(self) -> bool:
        """Whether the guest may not write."""
        return self.disk.read_only

    @property
    def is_leaving(self) -> bool:
        """Whether it is being detached."""
        return self.state is State.DETACHING

    @property
    def forced(self) -> bool:
        """Whether the image was taken away from under the guest."""
        return any(image.format == FAULT for image in self.images)

    @property
    def by_id(self) -> str:
        """The disk's stable path in the guest."""
        return buses.by_id_path(self.disk.bus, self.serial, self.place)

    async def wait_for_news(self, seconds: float) -> None:
        """Wait until the device is gone, somebody asks again, or the time has passed."""
        await first_of(self.gone, self.nudge, timeout=seconds)
        self.nudge.clear()

    def close_backings(self) -> None:
        """Close our descriptors of the images, where we still have them."""
        for image in self.images:
            image.close_backing()

    def to_state(self) -> dict[str, Any]:
        """What another process would need to take the disk over, as JSON values."""
        return save_disk(
            self.disk,
            self.identifiers,
            self.place,
            self.serial,
            self.images,
            limits=self.limits,
            boot=self.boot,
            state=self.state.value,
            done=self.done,
        )

    @classmethod
    def from_state(cls, saved: dict[str, Any]) -> AttachedDisk:
        """The attachment that another process had saved. Raises KeyError, TypeError or ValueError if it is none."""
        disk = load_disk(saved)
        return cls(
            disk,
            load_identifiers(saved),
            load_place(disk.bus, saved["place"]),
            str(saved["serial"]),
            [load_image(each) for each in saved["images"]],
            limits=load_limits(saved),
            boot=bool(saved["boot"]),
            done=[str(name) for name in saved["done"]],
            state=State(saved["state"]),
        )

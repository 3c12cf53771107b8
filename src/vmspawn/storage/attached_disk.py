# SPDX-License-Identifier: LGPL-2.1-or-later
"""A disk that is, is becoming or is ceasing to be attached: one kind of attachment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..errors import NoSuchStorage, VmspawnError
from ..hotplug.attachment import Attachment, EventNames, State
from ..hotplug.places import Place, Pool
from ..hotplug.qemu_objects import OBJECT, QemuObject
from ..hotplug.step import Make, PlugIn, Reserve, Step
from ..qmp.monitor import Command
from . import buses
from .disk import Disk
from .image import FAULT, Image
from .limits import NO_LIMITS, Limits
from .nodes import Identifiers
from .saved import load_disk, load_identifiers, load_image, load_limits, load_place, save_disk
from .steps import LIMITS, AddPivot, BuildImage

#: Events of our own, in the streams beside QEMU's.
ATTACHED_EVENT = "StorageAttached"
DETACHING_EVENT = "StorageDetaching"
DETACHED_EVENT = "StorageDetached"

#: Requests after which a guest that has not released an NVMe disk may never do so.
_STUBBORN = 2


@dataclass(slots=True, eq=False, repr=False)
class AttachedDisk(Attachment):
    """A disk with all that its nodes and its device are made of.

    `images` has the one that the disk stands on, and while it is swapped the other; an optical drive may have none.
    """

    kind: ClassVar[str] = "storage"
    events: ClassVar[EventNames | None] = EventNames(ATTACHED_EVENT, DETACHING_EVENT, DETACHED_EVENT)

    disk: Disk
    identifiers: Identifiers
    place: Place
    #: Where the place belongs.
    pool: Pool
    serial: str
    images: list[Image] = field(default_factory=list)
    limits: Limits = NO_LIMITS
    #: Images that the disk has left, and that QEMU cannot close yet.
    closing: list[Image] = field(default_factory=list)
    #: How many requests of the guest have failed since this manager has the disk, and what is known of the last.
    failures: int = 0
    last_failure: str = ""

    @property
    def name(self) -> str:
        """The name that the user gave the disk."""
        return self.disk.name

    @property
    def device(self) -> str:
        """The device's id in QEMU."""
        return self.identifiers.device

    # What depends on nothing comes first, but for the image, whose command with a descriptor begins a message: so all
    # of them are one.

    def steps(self) -> Sequence[Step]:
        """Place, image, I/O thread, limits, pivot, device."""
        return (
            Reserve(self.place, self.pool),
            BuildImage(self.disk, self.images),
            *self._thread(),
            self._limits(),
            AddPivot(self.identifiers, self.disk, self.images),
            PlugIn(self._properties()),
        )

    def _thread(self) -> Sequence[Step]:
        if not self.disk.thread or self.disk.bus != "virtio-blk":
            return ()
        name = self.identifiers.thread
        command = Command("object-add", {"qom-type": "iothread", "id": name})
        return (Make("thread", command, QemuObject(OBJECT, name)),)

    def _limits(self) -> Step:
        """The throttle group, whether there are limits or not."""
        name = self.identifiers.limits
        limits = {"limits": self.limits.to_qemu()} if self.limits.any else {}
        command = Command("object-add", {"qom-type": "throttle-group", "id": name, **limits})
        return Make(LIMITS, command, QemuObject(OBJECT, name))

    def _properties(self) -> dict[str, object]:
        return buses.device(
            self.disk,
            device_id=self.device,
            node=self.identifiers.pivot,
            place=self.place,
            serial=self.serial,
            thread=self.identifiers.thread if self.disk.thread else None,
        )

    def vanished(self) -> VmspawnError:
        """The error of an attach whose device was removed meanwhile."""
        return NoSuchStorage(f"{self.name} was removed through QMP while it was being attached")

    @property
    def is_whole(self) -> bool:
        """Whether it is complete if its device is there: nobody can tell that of an empty tray."""
        return bool(self.images)

    @property
    def still_closing(self) -> str:
        """Why it is still there although its device is gone."""
        return f"QEMU still closes the image of {self.name}"

    @property
    def not_released(self) -> str:
        """Why its device may still be there."""
        if self.disk.bus == "nvme" and self.removal and self.removal.requests > _STUBBORN:
            return f"the guest has not let go of {self.name}; one that uses an NVMe disk may never do so"
        return f"the guest has not let go of {self.name}; it may still be booting, or not know ACPI hot-plug"

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
    def has_open_image(self) -> bool:
        """Whether QEMU may have a file of the disk's open."""
        return any(image.backing is not None and image.done for image in self.images)

    @property
    def by_id(self) -> str:
        """The disk's stable path in the guest."""
        return buses.by_id_path(self.disk.bus, self.serial, self.place)

    def close(self) -> None:
        """Close our descriptors of the images, where we still have them."""
        for image in self.images:
            image.close_backing()

    def to_state(self) -> dict[str, Any]:
        """What another process needs to take the disk over, as JSON values."""
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
    def from_state(cls, saved: dict[str, Any], pool_of: Callable[[str, Place], Pool]) -> AttachedDisk:
        """The disk that another process had saved. Raises KeyError, TypeError or ValueError if it is none."""
        disk = load_disk(saved)
        place = load_place(disk.bus, saved["place"])
        return cls(
            disk,
            load_identifiers(saved),
            place,
            pool_of(disk.bus, place),
            str(saved["serial"]),
            [load_image(each) for each in saved["images"]],
            limits=load_limits(saved),
            boot=bool(saved["boot"]),
            done=[str(name) for name in saved["done"]],
            state=State(saved["state"]),
        )

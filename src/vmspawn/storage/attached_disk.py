# SPDX-License-Identifier: LGPL-2.1-or-later
"""Describes an attached disk as the steps that attach it, and as its record in the journal."""

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

#: Names of vmspawn's events in the streams of QEMU's events.
ATTACHED_EVENT = "StorageAttached"
DETACHING_EVENT = "StorageDetaching"
DETACHED_EVENT = "StorageDetached"

#: The number of unplug requests after which messages report that the guest may never release an NVMe disk.
_STUBBORN = 2


@dataclass(slots=True, eq=False, repr=False)
class AttachedDisk(Attachment):
    """A disk that is being attached, is attached or is being detached.

    The first of `images` is the disk's image; during a swap, the second is the other image. An optical drive may have
    none.
    """

    kind: ClassVar[str] = "storage"
    events: ClassVar[EventNames | None] = EventNames(ATTACHED_EVENT, DETACHING_EVENT, DETACHED_EVENT)

    disk: Disk
    identifiers: Identifiers
    place: Place
    #: The pool that the place is from.
    pool: Pool
    serial: str
    images: list[Image] = field(default_factory=list)
    limits: Limits = NO_LIMITS
    #: Former images of the disk that QEMU cannot close yet.
    closing: list[Image] = field(default_factory=list)
    #: The number of the guest's requests that failed under this manager, and a description of the last failure.
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

    # The image comes as early as its dependencies allow: its first command carries a descriptor and so begins a
    # message, and all commands of the disk go to QEMU in that message.

    def steps(self) -> Sequence[Step]:
        """Return the steps in order: place, image, I/O thread, limits, pivot, device."""
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
        """Return the step that makes the throttle group, which a disk without limits has as well."""
        name = self.identifiers.limits
        limits = {"limits": self.limits.to_qemu()} if self.limits.has_any else {}
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
        """Return the error of an attach whose device was removed meanwhile."""
        return NoSuchStorage(f"{self.name} was removed through QMP while it was being attached")

    @property
    def is_whole(self) -> bool:
        """True if the disk is complete when its device exists. That is not known for an empty optical drive."""
        return bool(self.images)

    @property
    def still_closing(self) -> str:
        """The reason why the disk still exists although its device is removed."""
        return f"QEMU has not closed the image of {self.name}"

    @property
    def not_released(self) -> str:
        """The likely reason why the device still exists."""
        if self.disk.bus == "nvme" and self.removal and self.removal.requests > _STUBBORN:
            return f"the guest has not released {self.name}; a guest that uses an NVMe disk may never do so"
        return f"the guest has not released {self.name}; it may still be booting, or lack ACPI hot-plug"

    @property
    def image(self) -> Image | None:
        """The image below the disk's pivot, or None for an empty optical drive."""
        return self.images[0] if self.images else None

    @property
    def node(self) -> str:
        """The block node of the image, or an empty string."""
        return self.image.top_node if self.image else ""

    @property
    def format(self) -> str:
        """The image's format. An empty optical drive has the format that it was attached with."""
        return self.image.format if self.image else self.disk.format or "raw"

    @property
    def read_only(self) -> bool:
        """True if the guest cannot write to the disk."""
        return self.disk.read_only

    @property
    def is_leaving(self) -> bool:
        """True while the disk is being detached."""
        return self.state is State.DETACHING

    @property
    def is_forced(self) -> bool:
        """True if a forced detach has taken the image away."""
        return any(image.format == FAULT for image in self.images)

    @property
    def has_open_image(self) -> bool:
        """True if QEMU may have a file of the disk open."""
        return any(image.backing is not None and image.done for image in self.images)

    @property
    def by_id(self) -> str:
        """The disk's stable path in the guest."""
        return buses.by_id_path(self.disk.bus, self.serial, self.place)

    def close(self) -> None:
        """Close the manager's descriptors of the images."""
        for image in self.images:
            image.close_backing()

    def to_state(self) -> dict[str, Any]:
        """Return the disk's record for state.json, from which another manager can adopt the disk."""
        return save_disk(
            self.disk,
            self.identifiers,
            self.place,
            self.serial,
            self.images,
            limits=self.limits,
            is_boot=self.is_boot,
            state=self.state.value,
            done=self.done,
        )

    @classmethod
    def from_state(cls, saved: dict[str, Any], pool_of: Callable[[str, Place], Pool]) -> AttachedDisk:
        """Return the disk of a record in state.json. Raises KeyError, TypeError or ValueError if it is invalid."""
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
            is_boot=bool(saved["boot"]),
            done=[str(name) for name in saved["done"]],
            state=State(saved["state"]),
        )

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the disks that QEMU starts with, and their nodes and devices on its command line."""

from __future__ import annotations

from ..hotplug import places
from ..record import Record
from ..storage import buses, nodes
from ..storage.disk import Disk
from ..storage.image import Image
from ..storage.nodes import Identifiers
from .overlay import Below


class BootDisk(Record):
    """A disk that QEMU starts with. It has the same nodes and device as a disk that is plugged in later."""

    disk: Disk
    identifiers: Identifiers
    place: places.Place
    #: None for an empty optical drive of a copy.
    image: Image | None
    serial: str
    #: The image below `image`, if `image` is an overlay.
    below: Below | None = None
    #: True for the machine's image, False for an extra disk.
    is_image: bool = False
    #: True if the disk cannot be detached while the machine runs.
    is_boot: bool = True

    @property
    def name(self) -> str:
        """The disk's name."""
        return self.disk.name

    @property
    def images(self) -> tuple[Image, ...]:
        """The image, in a tuple."""
        return (self.image,) if self.image is not None else ()

    @property
    def by_id(self) -> str:
        """The disk's stable path in the guest."""
        return buses.by_id_path(self.disk.bus, self.serial, self.place)

    @property
    def is_leaving(self) -> bool:
        """Never true: no disk is detached before QEMU has started."""
        return False

    @property
    def descriptors(self) -> list[int]:
        """The descriptors that QEMU inherits."""
        own = [each.backing.fd for top in self.images for each in top.chain if each.backing is not None]
        return own if self.below is None else [*own, self.below.fd]

    def close(self) -> None:
        """Close the descriptors, after QEMU has inherited them. May be called again."""
        for image in self.images:
            image.close_backing()
        if self.below is not None:
            self.below.close()

    def device(self) -> dict[str, object]:
        """Return the device's properties."""
        return buses.device(
            self.disk,
            device_id=self.identifiers.device,
            node=self.identifiers.pivot,
            place=self.place,
            serial=self.serial,
            thread=self.identifiers.thread if self.disk.thread else None,
        )

    def objects(self) -> list[dict[str, object]]:
        """Return the objects that the nodes and the device need."""
        limits = {"limits": self.disk.limits.to_qemu()} if self.disk.limits.has_any else {}
        group: dict[str, object] = {"qom-type": "throttle-group", "id": self.identifiers.limits, **limits}
        thread: dict[str, object] = {"qom-type": "iothread", "id": self.identifiers.thread}
        return [group, thread] if self.disk.thread else [group]

    def nodes(self) -> list[dict[str, object]]:
        """Return the block nodes' options, from the bottom up."""
        if self.image is None:
            return [nodes.blank_node(self.identifiers)]
        found = []
        for image in reversed(self.image.chain):
            found.append(nodes.file_node(image, self.disk))
            if image.format != "raw":
                overlaid = {"backing": self.below.node["node-name"]} if self.below and image.base is None else {}
                found.append({**nodes.format_node(image, self.disk), **overlaid})
        found.append(nodes.pivot_node(self.identifiers, self.image, self.disk, read_only=self.disk.read_only))
        return found

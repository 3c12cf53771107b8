# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the steps that only disks have: the image and the pivot."""

from __future__ import annotations

from collections.abc import Sequence

from ..hotplug.qemu_objects import QemuObject
from ..hotplug.step import Step
from ..qmp.monitor import Command
from . import image_nodes, nodes
from .disk import Disk
from .image import Image
from .nodes import Identifiers

#: The names of the steps in the journal.
IMAGE = "image"
PIVOT = "pivot"
LIMITS = "limits"


class BuildImage(Step):
    """Opens the image in QEMU. `images` is the disk's own list, and undoing the step removes all images in it."""

    __slots__ = ("_disk", "_images")

    def __init__(self, disk: Disk, images: list[Image]) -> None:
        super().__init__(IMAGE)
        self._disk = disk
        self._images = images

    @property
    def is_needed(self) -> bool:
        return bool(self._images)

    def begin(self) -> Sequence[Command]:
        return image_nodes.commands(self._disk, self._images[0])

    def spent(self) -> Sequence[QemuObject]:
        return [each for image in self._images for each in image_nodes.spent(image)]

    def made(self) -> None:
        for image in self._images:
            image_nodes.made(image)

    def objects(self) -> Sequence[QemuObject]:
        return [each for image in self._images for each in image_nodes.objects(image)]

    def end(self) -> None:
        for image in self._images:
            image.close_backing()
        self._images.clear()


class AddPivot(Step):
    """Adds the pivot above the image. The device uses the pivot."""

    __slots__ = ("_disk", "_identifiers", "_images")

    def __init__(self, identifiers: Identifiers, disk: Disk, images: Sequence[Image]) -> None:
        super().__init__(PIVOT)
        self._identifiers = identifiers
        self._disk = disk
        self._images = images

    def begin(self) -> Sequence[Command]:
        if self._images:
            read_only = self._disk.read_only
            options = nodes.pivot_node(self._identifiers, self._images[0], self._disk, read_only=read_only)
        else:
            options = nodes.blank_node(self._identifiers)
        return (Command("blockdev-add", options),)

    def objects(self) -> Sequence[QemuObject]:
        return (QemuObject(image_nodes.NODE, self._identifiers.pivot),)

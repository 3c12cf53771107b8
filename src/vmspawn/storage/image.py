# SPDX-License-Identifier: LGPL-2.1-or-later
"""Describes an image below a disk's pivot (`nodes.py`), and records which parts of the image QEMU may have.

A disk has one image, and two while one image replaces the other.
"""

from __future__ import annotations

from typing import Any

from ..text import utf8
from .backing import Backing

#: All monitors of a QEMU share the numbers of descriptor sets. QEMU chooses 0, 1, 2 … for clients that name no number;
#: vmspawn's numbers begin far beyond them.
FDSET_BASE = 1_000_000

#: The format of an image that has no file and fails every request. A forced detach puts this image below the pivot.
FAULT = "fault"


class Image:
    """An image. `number` is fresh for every image.

    The manager owns `backing.fd` until QEMU has a duplicate; from then on it is -1. `backing` is None for an image that
    fails every request. `done` has the names of the parts that may exist in QEMU, from the bottom up, and is saved in
    the journal. `base` is the image below an overlay; it is never written.
    """

    __slots__ = ("backing", "base", "done", "format", "has_long_names", "number", "path", "size")

    # This module is on the start path, where importing dataclasses would take too long.
    def __init__(
        self,
        number: int,
        backing: Backing | None,
        format: str,
        path: str = "",
        *,
        size: int = 0,
        has_long_names: bool = False,
        base: Image | None = None,
    ) -> None:
        """Describe an image.

        `size`, in bytes, is for an image without a file. `Identifiers` explains `has_long_names`.
        """
        self.number = number
        self.backing = backing
        self.format = format
        #: The path in valid UTF-8, for messages and for JSON.
        self.path = utf8(path)
        self.size = size
        self.has_long_names = has_long_names
        self.base = base
        self.done: list[str] = []

    @property
    def fdset(self) -> int:
        """The number of the image's descriptor set."""
        return FDSET_BASE + self.number

    @property
    def file_node(self) -> str:
        """The name of the node that opens the descriptor."""
        return f"image{self.number}-file" if self.has_long_names else f"image{self.number}"

    @property
    def format_node(self) -> str:
        """The name of the format's node, which a raw image does not have."""
        return f"image{self.number}-format"

    @property
    def top_node(self) -> str:
        """The name of the node below the pivot."""
        return self.file_node if self.format == "raw" else self.format_node

    @property
    def is_writable(self) -> bool:
        """True if the image is open for writing."""
        return self.backing is not None and self.backing.is_writable

    @property
    def chain(self) -> list[Image]:
        """The image and all images below it, from the top down."""
        return [self, *self.base.chain] if self.base is not None else [self]

    def close_backing(self) -> None:
        """Close the manager's open descriptors of the image and of all images below it."""
        if self.base is not None:
            self.base.close_backing()
        if self.backing is not None and self.backing.fd >= 0:
            self.backing.close()
            self.backing = self.backing._replace(fd=-1)

    def to_state(self) -> dict[str, Any]:
        """Return the image's record for state.json, from which another manager can adopt the image."""
        backing = self.backing
        return {
            "number": self.number,
            "format": self.format,
            "path": self.path,
            "size": self.size,
            "done": list(self.done),
            **({"long-names": True} if self.has_long_names else {}),
            **({"base": self.base.to_state()} if self.base is not None else {}),
            "backing": backing
            and {"block": backing.is_block_device, "writable": backing.is_writable, "identity": list(backing.identity)},
        }

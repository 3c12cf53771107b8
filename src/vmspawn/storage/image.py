# SPDX-License-Identifier: LGPL-2.1-or-later
"""One image under a disk's pivot, with the journal of its own parts. A disk has one, and two while one replaces the
other."""

from __future__ import annotations

from typing import Any

from ..text import utf8
from .backing import Backing

#: Descriptor sets are one space for all of a QEMU's monitors, and 0, 1, 2 … is what QEMU picks for clients that name
#: none. Ours begin where no client counts to.
FDSET_BASE = 1_000_000

#: The format of an image that has no file, and fails every request: what a disk stands on that was detached by force.
FAULT = "fault"


class Image:
    """An image and all that taking it apart needs. `number` is fresh for every image.

    `backing.fd` is ours until QEMU has it, and -1 from then on; `backing` is None for one that fails every request.
    `done` is the journal: the names of the parts that may be there, from the bottom up.
    """

    __slots__ = ("backing", "done", "format", "long", "number", "path", "size")

    # On the start path, where dataclasses would take long to load.
    def __init__(
        self,
        number: int,
        backing: Backing | None,
        format: str,
        path: str = "",
        *,
        size: int = 0,
        long: bool = False,
    ) -> None:
        """`size` is that of an image without a file, in bytes; `long` names are explained at `Identifiers`."""
        self.number = number
        self.backing = backing
        self.format = format
        #: For people, and for JSON, which has only text.
        self.path = utf8(path)
        self.size = size
        self.long = long
        self.done: list[str] = []

    @property
    def fdset(self) -> int:
        """The number of the descriptor set."""
        return FDSET_BASE + self.number

    @property
    def file_node(self) -> str:
        """The node that opens the descriptor."""
        return f"image{self.number}-file" if self.long else f"image{self.number}"

    @property
    def format_node(self) -> str:
        """The node of the format; a raw image needs none."""
        return f"image{self.number}-format"

    @property
    def top_node(self) -> str:
        """The node that the pivot stands on."""
        return self.file_node if self.format == "raw" else self.format_node

    @property
    def writable(self) -> bool:
        """Whether the image may be written."""
        return self.backing is not None and self.backing.writable

    def close_backing(self) -> None:
        """Close our descriptor of the image, if we still have it."""
        if self.backing is not None and self.backing.fd >= 0:
            self.backing.close()
            self.backing = self.backing._replace(fd=-1)

    def to_state(self) -> dict[str, Any]:
        """What another process would need to take the image over, as JSON values."""
        backing = self.backing
        return {
            "number": self.number,
            "format": self.format,
            "path": self.path,
            "size": self.size,
            "done": list(self.done),
            **({"long-names": True} if self.long else {}),
            "backing": backing
            and {"block": backing.block, "writable": backing.writable, "identity": list(backing.identity)},
        }

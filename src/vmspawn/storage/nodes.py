# SPDX-License-Identifier: LGPL-2.1-or-later
"""The block nodes of a drive: a file node on a descriptor set, and the format above it."""

from __future__ import annotations

from typing import NamedTuple

from .drive import Backing

#: Descriptor sets are one space for all of a QEMU's monitors, and 0, 1, 2 … is what QEMU picks for clients that name
#: none. Ours begin where no client counts to.
FDSET_BASE = 1_000_000


class Identifiers(NamedTuple):
    """The names of one attachment inside QEMU. `number` is fresh for every attachment, so none is ever used twice: QEMU
    may still know a device that it has been told to remove."""

    number: int

    @property
    def device(self) -> str:
        """The qdev id."""
        return f"drive{self.number}"

    @property
    def file_node(self) -> str:
        """The node that opens the descriptor."""
        return f"drive{self.number}-file"

    @property
    def format_node(self) -> str:
        """The node that the device stands on."""
        return f"drive{self.number}-format"

    @property
    def fdset(self) -> int:
        """The number of the descriptor set."""
        return FDSET_BASE + self.number


def file_node(identifiers: Identifiers, backing: Backing) -> dict[str, object]:
    """The options of the file node, for blockdev-add and -blockdev alike (QEMU's qapi/block-core.json)."""
    return {
        "driver": "host_device" if backing.block else "file",
        "node-name": identifiers.file_node,
        "filename": f"/dev/fdset/{identifiers.fdset}",
        "read-only": not backing.writable,
        # Else QEMU opens read-only first and reopens later, when the descriptor set is gone.
        "auto-read-only": False,
        "discard": "unmap",
    }


def format_node(identifiers: Identifiers, backing: Backing, image_format: str) -> dict[str, object]:
    """The options of the format node, for blockdev-add and -blockdev alike."""
    return {
        "driver": image_format,
        "node-name": identifiers.format_node,
        "file": identifiers.file_node,
        "read-only": not backing.writable,
        "discard": "unmap",
    }

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the content of manifest.json, which describes a snapshot, and reads it.

This module is on the start path and imports next to nothing.
"""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple

from ..boot.incoming import Option
from ..errors import StartError
from ..images import snapshot_files

#: The version of the manifest's format. Older versions are read, newer ones are refused.
#: 1: had neither the firmware, nor the host's processor, nor `is_copy`.
VERSION = 2


#: The key in MACHINE@current's section of the disks for disks that were detached or got another image. Their overlays
#: have data that is not in the images below yet.
DETACHED = "detached"


class SnapshotFile(NamedTuple):
    """A file that a snapshot consists of, as it was when the snapshot was made.

    `size` is -1 for a file that is not checked for changes, such as an overlay that a machine writes to.
    """

    path: str
    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: str, fd: int) -> SnapshotFile:
        """Describe an open file."""
        found = os.fstat(fd)
        return cls(path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)

    @classmethod
    def growing(cls, path: str) -> SnapshotFile:
        """Describe a file that is not checked for changes, such as an overlay. Raises OSError."""
        found = os.stat(path)
        return cls(path, found.st_dev, found.st_ino, -1, 0)

    def is_unchanged(self, fd: int) -> bool:
        """Return whether an open file has the content that the snapshot needs.

        Compares the size and the modification time.
        """
        if self.size < 0:
            return True
        found = os.fstat(fd)
        return (found.st_size, found.st_mtime_ns) == (self.size, self.mtime_ns)


class Source(NamedTuple):
    """The QEMU that saved a snapshot. The same QEMU must load it."""

    path: str
    #: The version in the first line of `--version`.
    version: str
    #: The size and time of the binary.
    size: int
    mtime_ns: int
    #: The fields of QemuBinary.
    binary: dict[str, Any]


class State(NamedTuple):
    """The saved state of RAM and devices."""

    file: str
    size: int
    #: The URI scheme by which QEMU saved it, `fd` or `file`.
    scheme: str
    #: The number of bytes of memory in a separate file beside the file of the state.
    memory: int = 0

    @property
    def total(self) -> int:
        """The number of bytes of memory and devices."""
        return self.size + self.memory


class Firmware(NamedTuple):
    """A UEFI firmware that a machine was started with."""

    path: str
    sha256: str


class Manifest(NamedTuple):
    """A snapshot. `state` is None for MACHINE@current, which has only disks (see newest.py)."""

    machine: str
    name: str
    created: float
    parent: str
    #: True for a snapshot that was made for copies, and is removed with the last copy.
    is_temporary: bool
    #: True if the guest ran when it was saved.
    was_running: bool
    qemu: Source
    machine_type: str
    accelerator: str
    #: The fields of MachineConfig that outlive the start.
    config: dict[str, Any]
    options: tuple[Option, ...]
    #: The files of the source's descriptors, by number: a path, or the name of a file in the snapshot's directory.
    descriptors: dict[int, str]
    #: The sections of the journal, by the kind of attachment.
    attachments: dict[str, Any]
    #: The size of each disk in bytes, by its pivot node.
    sizes: dict[str, int]
    #: The path of each image's file, by the image's number.
    images: dict[int, str]
    #: The images, and the other files that are not in the snapshot's directory, except the firmware.
    files: tuple[SnapshotFile, ...]
    state: State | None
    #: The firmware, unless it is QEMU's own.
    firmware: Firmware | None = None
    #: The model and the features of the host's processor if the guest uses KVM.
    processor: str = ""
    #: True for a copy: its overlays are never written to the images below, which belong to its source.
    is_copy: bool = False
    #: The machine's QEMU: the host's boot, the process id and the start time. Empty in older manifests, and for a copy
    #: whose QEMU was not started yet.
    process: str = ""

    @property
    def full_name(self) -> str:
        """The name as MACHINE@NAME."""
        return f"{self.machine}@{self.name}"

    def to_json(self) -> bytes:
        """Return the content of manifest.json."""
        fields = self._asdict()
        fields["qemu"] = self.qemu._asdict()
        fields["options"] = [list(each) for each in self.options]
        fields["files"] = [each._asdict() for each in self.files]
        fields["state"] = self.state and self.state._asdict()
        fields["firmware"] = self.firmware and self.firmware._asdict()
        return json.dumps({"version": VERSION, **fields}, indent=1).encode()


def load(content: bytes, what: str) -> Manifest:
    """Read the content of a manifest. Raises StartError."""
    try:
        found = json.loads(content)
        if (version := int(found.pop("version"))) > VERSION:
            raise StartError(f"snapshot {what} was made by a newer vmspawn (its manifest has version {version})")
        is_copy = str(found["parent"]).partition("@")[0] not in ("", found["machine"])
        return Manifest(
            **{
                "is_copy": is_copy,
                **found,
                "qemu": Source(**found["qemu"]),
                "options": tuple(Option(*each) for each in found["options"]),
                "descriptors": {int(number): str(path) for number, path in found["descriptors"].items()},
                "images": {int(number): str(path) for number, path in found["images"].items()},
                "files": tuple(SnapshotFile(**each) for each in found["files"]),
                "state": State(**found["state"]) if found["state"] else None,
                "firmware": Firmware(**found["firmware"]) if found.get("firmware") else None,
            }
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StartError(
            f"the manifest of snapshot {what} is damaged: {error!r}",
            hint=f"restore it; if nothing of the snapshot is needed: rm -r {os.path.join(snapshot_files.root(), what)}",
        ) from None

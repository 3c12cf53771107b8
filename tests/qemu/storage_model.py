# SPDX-License-Identifier: LGPL-2.1-or-later
"""Models the expected disks of a machine, observes the actual ones, and compares the two."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from tests.conftest import make_raw
from tests.machines import Machine, Resources, links_of
from vmspawn.errors import BadConfig, ConfigNotSupported, StoragePending, VmspawnError
from vmspawn.host.runtime import STATE

#: The class of the error that refuses an operation.
Error = type[VmspawnError]

#: The driver of QEMU's device for a disk on each bus.
DEVICES = {
    "virtio-blk": "virtio-blk-pci",
    "nvme": "nvme",
    "nvme-ns": "nvme-ns",
    "virtio-scsi": "scsi-hd",
    "scsi-cd": "scsi-cd",
}
#: Buses whose devices use a port, and are removed only when the guest releases them.
PCI_BUSES = ("virtio-blk", "nvme")
#: Buses on which an attached disk can be resized.
RESIZABLE_BUSES = ("virtio-blk", "virtio-scsi")


@dataclass(eq=False)
class ImageFile:
    """A file on the host."""

    name: str
    format: str
    size: int


@dataclass(eq=False)
class ExpectedDisk:
    """A disk as the model expects it."""

    name: str
    bus: str
    read_only: bool
    #: None for an optical drive without a medium, or for a disk whose image a forced detach has taken away.
    image: ImageFile | None
    size: int
    thread: bool = False
    detaching: bool = False
    forced: bool = False
    #: True if QEMU has requested that the guest release the disk; a reset completes that.
    asked: bool = False

    @property
    def on_pci(self) -> bool:
        """True if the disk uses a port."""
        return self.bus in PCI_BUSES

    @property
    def state(self) -> str:
        """The disk's state in the register."""
        return "detaching" if self.detaching else "attached"

    def nodes(self) -> Iterable[str]:
        """Yield the drivers of the disk's block nodes."""
        if self.forced:
            # Below the throttle filter, blkdebug fails every request.
            yield from ("throttle", "blkdebug", "null-co")
        elif self.image is not None:
            yield from ("throttle", "file")
            yield from () if self.image.format == "raw" else (self.image.format,)

    def objects(self) -> Iterable[str]:
        """Yield the types of the disk's objects."""
        yield "throttle-group"
        yield from ("iothread",) if self.thread and self.bus == "virtio-blk" else ()

    def replace_error(self, file: ImageFile, *, shrink: bool) -> Error | None:
        """Return the error for another image, or None if it is accepted."""
        if self.bus == "scsi-cd":
            return ConfigNotSupported
        if self.detaching:
            return StoragePending
        if file.size == self.size:
            return None
        if self.read_only or self.bus not in RESIZABLE_BUSES:
            return ConfigNotSupported
        return BadConfig if file.size < self.size and not shrink else None

    def resize_error(self, size: int, *, shrink: bool) -> Error | None:
        """Return the error for another size, or None if it is accepted."""
        if self.detaching:
            return StoragePending
        if self.bus not in RESIZABLE_BUSES or self.read_only:
            return ConfigNotSupported
        return BadConfig if size < self.size and not shrink else None


@dataclass(frozen=True)
class Picture:
    """All disks at one moment, from the model or from the machine."""

    #: By name: the state, whether a forced detach has taken the image away, and the size.
    disks: dict[str, tuple[str, bool, int]]
    #: The states in state.json, by name.
    journal: dict[str, str]
    ports_free: int
    nodes: Counter[str]
    devices: Counter[str]
    objects: Counter[str]
    #: The number of times that QEMU has each file open.
    open_images: Counter[str]
    #: The number of descriptors in QEMU's descriptor sets.
    passed: int = 0
    #: The number of images' descriptors that the manager has open.
    own: int = 0

    def changes_since(self, before: Picture) -> Picture:
        """Return the differences to a picture that was taken when the machine had only its boot disks."""
        return Picture(
            {name: disk for name, disk in self.disks.items() if name not in before.disks},
            {name: state for name, state in self.journal.items() if name not in before.journal},
            self.ports_free - before.ports_free,
            self.nodes - before.nodes,
            self.devices - before.devices,
            self.objects - before.objects,
            self.open_images - before.open_images,
            self.passed - before.passed,
            self.own - before.own,
        )


@dataclass
class Model:
    """The disks and files that are expected."""

    disks: dict[str, ExpectedDisk] = field(default_factory=dict)
    files: list[ImageFile] = field(default_factory=list)

    def idle_files(self, image_format: str) -> list[ImageFile]:
        """Return the files of a format that no disk uses."""
        used = [disk.image for disk in self.disks.values()]
        return [file for file in self.files if file.format == image_format and file not in used]

    def holds(self, file: ImageFile, *, writing: bool) -> bool:
        """Return whether a disk has the file, and the disk or the new user of the file (`writing`) writes to it."""
        return any(disk.image is file and (writing or not disk.read_only) for disk in self.disks.values())

    def picture(self) -> Picture:
        """Return a picture without the boot disks. `ports_free` is minus the number of ports that the disks use."""
        disks = self.disks.values()
        return Picture(
            disks={disk.name: (disk.state, disk.forced, disk.size) for disk in disks},
            journal={disk.name: disk.state for disk in disks},
            ports_free=-sum(disk.on_pci for disk in disks),
            nodes=Counter(node for disk in disks for node in disk.nodes()),
            devices=Counter(DEVICES[disk.bus] for disk in disks),
            objects=Counter(each for disk in disks for each in disk.objects()),
            open_images=Counter(disk.image.name for disk in disks if disk.image),
        )


async def look(machine: Machine, folder: Path) -> Picture:
    """Return the machine's disks, read from its register, its journal, QEMU's monitor and /proc."""
    monitor = machine.monitor
    sizes = await machine.sizes()
    nodes = await monitor.execute("query-named-block-nodes", {"flat": True})
    devices = await monitor.execute("qom-list", {"path": "/machine/peripheral"})
    objects = await monitor.execute("qom-list", {"path": "/objects"})
    fdsets = await monitor.execute("query-fdsets")
    return Picture(
        disks={each.name: (each.state.value, each.is_forced, sizes[each.name]) for each in machine.storage},
        journal=_journal(Path(machine.directory.file(STATE))),
        ports_free=machine.storage.ports_free,
        nodes=Counter(node["drv"] for node in nodes),
        devices=Counter(_child_types(devices)),
        objects=Counter(_child_types(objects)),
        open_images=open_images(machine.pid, folder),
        passed=sum(len(fdset["fds"]) for fdset in fdsets),
        own=open_images(os.getpid(), folder).total(),
    )


def _journal(path: Path) -> dict[str, str]:
    return {each["name"]: _state(each) for each in json.loads(path.read_text())["storage"]["attachments"]}


def _state(entry: dict[str, Any]) -> str:
    """Return an entry's state. The entry of an attached disk with an image is not rewritten: it is `attaching`."""
    made = entry["state"] == "attaching" and entry["images"]
    return "attached" if made else str(entry["state"])


def _child_types(entries: list[dict[str, str]]) -> Iterable[str]:
    types = (entry["type"] for entry in entries)
    return (each.removeprefix("child<").removesuffix(">") for each in types if each.startswith("child<"))


def open_images(pid: int, folder: Path) -> Counter[str]:
    """Return the files of a directory that a process has open, and how often."""
    return Counter(os.path.basename(link) for link in links_of(pid) if link.startswith(f"{folder}/"))


def check_equal(actual: Picture | Resources, expected: Picture | Resources) -> None:
    """Fail with the names of the differences."""
    names = [each.name for each in fields(actual)]
    different = [name for name in names if getattr(actual, name) != getattr(expected, name)]
    assert not different, "; ".join(
        f"{name} is {getattr(actual, name)} and should be {getattr(expected, name)}" for name in different
    )


def check_one_line(error: VmspawnError) -> None:
    """Check that the message is one line, and that the hint is one line."""
    assert "\n" not in f"{error}{error.hint}"


def make_image(folder: Path, name: str, image_format: str, size: int) -> ImageFile:
    """Make an empty image."""
    path = folder / name
    if image_format == "raw":
        make_raw(path, size)
    else:
        path.write_bytes(_empty_image(image_format, size))
    return ImageFile(name, image_format, size)


@cache
def _empty_image(image_format: str, size: int) -> bytes:
    with tempfile.NamedTemporaryFile(prefix="vmspawn-image-") as file:
        subprocess.run(["qemu-img", "create", "-q", "-f", image_format, file.name, str(size)], check=True)
        return Path(file.name).read_bytes()

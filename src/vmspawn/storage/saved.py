# SPDX-License-Identifier: LGPL-2.1-or-later
"""Converts disks to and from their records in state.json, from which another manager can adopt them.

This module is on the start path and imports next to nothing: boot disks are recorded before QEMU starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..hotplug.places import NamespacePlace, PciPlace, Place, ScsiPlace
from . import buses
from .backing import Backing
from .disk import Disk
from .image import Image
from .limits import NO_LIMITS, Limits
from .nodes import Identifiers

# The fields of a Disk that are saved under `options`, by their names in state.json.
_OPTIONS = {
    "read-only": "read_only",
    "format": "format",
    "discard": "discard",
    "detect-zeroes": "detect_zeroes",
    "cache": "cache",
    "aio": "aio",
    "thread": "thread",
    "share": "share",
    "boot-index": "boot_index",
    "on-error": "on_error",
}


def save_disk(
    disk: Disk,
    identifiers: Identifiers,
    place: Place,
    serial: str,
    images: Iterable[Image],
    *,
    limits: Limits = NO_LIMITS,
    is_boot: bool = False,
    state: str = "attached",
    done: Iterable[str] = (),
) -> dict[str, Any]:
    """Return a disk's record."""
    return {
        "name": disk.name,
        "bus": disk.bus,
        "options": {name: getattr(disk, field) for name, field in _OPTIONS.items()},
        "serial": serial,
        "limits": list(limits),
        "boot": is_boot,
        "number": identifiers.number,
        **({"long-names": True} if identifiers.has_long_names else {}),
        "place": list(place),
        "images": [image.to_state() for image in images],
        "state": state,
        "done": list(done),
    }


def load_disk(saved: Mapping[str, Any]) -> Disk:
    """Return the disk that the user requested. An option that an older version did not save has its default."""
    options = {field: saved["options"][name] for name, field in _OPTIONS.items() if name in saved["options"]}
    images = saved["images"]
    path = str(images[0]["path"]) if images else ""
    return Disk(path, str(saved["name"]), str(saved["bus"]), limits=load_limits(saved), **options)


def load_identifiers(saved: Mapping[str, Any]) -> Identifiers:
    """Return a disk's names in QEMU."""
    return Identifiers(int(saved["number"]), bool(saved.get("long-names")))


def load_limits(saved: Mapping[str, Any]) -> Limits:
    """Return a disk's limits."""
    return Limits(*saved["limits"])


def load_place(bus: str, values: list[Any]) -> Place:
    """Return the place of a disk on that bus."""
    match buses.TABLE[bus].pool:
        case "scsi":
            controller, target, lun = values
            return ScsiPlace(str(controller), int(target), int(lun))
        case "namespaces":
            controller, nsid = values
            return NamespacePlace(str(controller), int(nsid))
        case _:
            return load_pci_place(values)


def load_pci_place(values: list[Any]) -> PciPlace:
    """Return a port or slot."""
    on, address = values
    return PciPlace(str(on), str(address))


def load_image(saved: Mapping[str, Any]) -> Image:
    """Return an image without a descriptor: only QEMU can have it open."""
    found = saved["backing"]
    backing = found and Backing(-1, bool(found["block"]), bool(found["writable"]), tuple(found["identity"]), 0)
    image = Image(
        int(saved["number"]),
        backing or None,
        str(saved["format"]),
        str(saved["path"]),
        size=int(saved["size"]),
        has_long_names=bool(saved.get("long-names")),
        base=load_image(saved["base"]) if saved.get("base") else None,
    )
    image.done = [str(name) for name in saved["done"]]
    return image

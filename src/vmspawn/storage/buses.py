# SPDX-License-Identifier: LGPL-2.1-or-later
"""Describes each bus: QEMU's device for a disk, and the name that the guest's udev gives the disk."""

from __future__ import annotations

from collections.abc import Iterable

from ..hotplug.places import NAMESPACE_CONTROLLER, SCSI_CONTROLLER, NamespacePlace, Place
from ..record import Record
from .disk import Disk


class Bus(Record):
    """The properties of one bus.

    `pool` names the pool of the bus's places: "pci", "scsi" or "namespaces". `by_id` is the name of a disk below
    /dev/disk/by-id, from udev's rules.
    """

    driver: str
    pool: str
    by_id: str
    is_writable: bool = True
    #: True if the guest notices a new size of an attached disk (docs/qemu.md, "Block nodes and locks").
    is_resizable: bool = True
    #: True if QEMU asks the guest to release the device before it removes the device.
    is_guest_asked: bool = True
    #: True if QEMU can stop the guest when a request fails.
    can_stop_guest: bool = True


#: The serial number of the controller of namespaces. Namespaces have no serial numbers of their own.
NAMESPACE_SERIAL = "vmspawn"

#: The values of `by_id` are from udev's 60-persistent-storage.rules: virtio-SERIAL; nvme-MODEL_SERIAL, and _NSID if a
#: controller has several namespaces; scsi- and the name that scsi_id reads from VPD page 0x83, in which QEMU puts a
#: disk's serial number into a vendor specific designator (type 0).
TABLE = {
    "virtio-blk": Bus("virtio-blk-pci", "pci", "virtio-{serial}"),
    "nvme": Bus("nvme", "pci", "nvme-QEMU_NVMe_Ctrl_{serial}", is_resizable=False, can_stop_guest=False),
    "nvme-ns": Bus(
        "nvme-ns",
        "namespaces",
        "nvme-QEMU_NVMe_Ctrl_{serial}",
        is_resizable=False,
        is_guest_asked=False,
        can_stop_guest=False,
    ),
    "virtio-scsi": Bus("scsi-hd", "scsi", "scsi-0QEMU_QEMU_HARDDISK_{serial}", is_guest_asked=False),
    "scsi-cd": Bus(
        "scsi-cd",
        "scsi",
        "scsi-0QEMU_QEMU_CD-ROM_{serial}",
        is_writable=False,
        is_resizable=False,
        is_guest_asked=False,
    ),
}


def by_id_path(bus: str, serial: str, place: Place | None = None) -> str:
    """Return the stable path of a disk in the guest."""
    if isinstance(place, NamespacePlace):
        serial = f"{NAMESPACE_SERIAL}_{place.nsid}"
    return "/dev/disk/by-id/" + TABLE[bus].by_id.format(serial=serial)


def namespace_uuid(name: str) -> str:
    """Return a namespace's UUID, which is a hash of its disk's name (RFC 9562, version 8)."""
    import hashlib

    digest = bytearray(hashlib.sha256(b"vmspawn namespace " + name.encode()).digest()[:16])
    digest[6] = digest[6] & 0x0F | 0x80
    digest[8] = digest[8] & 0x3F | 0x80
    text = digest.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def controller(name: str, place: Place) -> dict[str, object]:
    """Return the properties of the controller with that id, for device_add and for -device alike."""
    if name == NAMESPACE_CONTROLLER:
        return {"driver": "nvme", "id": name, "serial": NAMESPACE_SERIAL, **place.properties()}
    return {"driver": "virtio-scsi-pci", "id": name, **place.properties()}


def controllers_at_boot(buses: Iterable[str]) -> list[str]:
    """Return the ids of the controllers of a QEMU that starts with disks on these buses."""
    has_namespaces = any(TABLE[bus].pool == "namespaces" for bus in buses)
    return [SCSI_CONTROLLER, *([NAMESPACE_CONTROLLER] if has_namespaces else [])]


# For `enospc`, QEMU's defaults apply: werror=enospc and rerror=report, because a read cannot fail for lack of space.
_ON_ERROR: dict[str, dict[str, object]] = {
    "": {},
    "report": {"werror": "report", "rerror": "report"},
    "stop": {"werror": "stop", "rerror": "stop"},
    "enospc": {},
}


def device(
    disk: Disk, *, device_id: str, node: str, place: Place, serial: str, thread: str | None = None
) -> dict[str, object]:
    """Return the properties of the device that makes `node` a disk, for device_add and for -device alike.

    `thread` is the I/O thread's id.
    """
    properties: dict[str, object] = {
        "driver": TABLE[disk.bus].driver,
        "id": device_id,
        "drive": node,
        **place.properties(),
    }
    if isinstance(place, NamespacePlace):
        properties["uuid"] = namespace_uuid(disk.name)
    else:
        properties["serial"] = serial
    if thread is not None and disk.bus == "virtio-blk":
        properties["iothread"] = thread
    if TABLE[disk.bus].can_stop_guest:
        properties |= _ON_ERROR[disk.on_error]
    if disk.share:
        properties["share-rw"] = True
    if disk.boot_index >= 0:
        properties["bootindex"] = disk.boot_index
    return properties

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The buses: which QEMU device a disk becomes, and what the guest's udev calls it."""

from collections.abc import Iterable
from typing import NamedTuple

from ..hotplug.places import NAMESPACE_CONTROLLER, SCSI_CONTROLLER, NamespacePlace, Place
from .disk import Disk


class Bus(NamedTuple):
    """How one bus is made. `by_id` is the name that udev's rules give the disk under /dev/disk/by-id."""

    driver: str
    pool: str
    by_id: str
    writable: bool = True
    #: Whether the guest can be told another size while the disk is there (docs/qemu.md, "Block nodes and locks").
    resizable: bool = True
    #: Whether the guest is asked to let go of the device.
    asks: bool = True
    #: Whether QEMU can stop the guest where a request fails.
    stops: bool = True


#: The serial number of the controller that carries the namespaces; theirs have none of their own.
NAMESPACE_SERIAL = "vmspawn"

#: udev's 60-persistent-storage.rules: virtio-SERIAL; nvme-MODEL_SERIAL, with _NSID where a controller has several
#: namespaces; scsi- and the name that scsi_id makes of VPD page 0x83, for which QEMU puts a disk's serial into a
#: vendor specific designator (type 0).
TABLE = {
    "virtio-blk": Bus("virtio-blk-pci", "pci", "virtio-{serial}"),
    "nvme": Bus("nvme", "pci", "nvme-QEMU_NVMe_Ctrl_{serial}", resizable=False, stops=False),
    "nvme-ns": Bus("nvme-ns", "namespaces", "nvme-QEMU_NVMe_Ctrl_{serial}", resizable=False, asks=False, stops=False),
    "virtio-scsi": Bus("scsi-hd", "scsi", "scsi-0QEMU_QEMU_HARDDISK_{serial}", asks=False),
    "scsi-cd": Bus("scsi-cd", "scsi", "scsi-0QEMU_QEMU_CD-ROM_{serial}", writable=False, resizable=False, asks=False),
}


def by_id_path(bus: str, serial: str, place: Place | None = None) -> str:
    """The stable path of the disk in the guest."""
    if isinstance(place, NamespacePlace):
        serial = f"{NAMESPACE_SERIAL}_{place.nsid}"
    return "/dev/disk/by-id/" + TABLE[bus].by_id.format(serial=serial)


def namespace_uuid(name: str) -> str:
    """The UUID of a namespace, made from its disk's name; the same for the same name. (RFC 9562, version 8.)"""
    import hashlib

    digest = bytearray(hashlib.sha256(b"vmspawn namespace " + name.encode()).digest()[:16])
    digest[6] = digest[6] & 0x0F | 0x80
    digest[8] = digest[8] & 0x3F | 0x80
    text = digest.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def controller(name: str, place: Place) -> dict[str, object]:
    """The properties of the controller with that id, for device_add and for -device alike."""
    if name == NAMESPACE_CONTROLLER:
        return {"driver": "nvme", "id": name, "serial": NAMESPACE_SERIAL, **place.properties()}
    return {"driver": "virtio-scsi-pci", "id": name, **place.properties()}


def controllers_at_boot(buses: Iterable[str]) -> list[str]:
    """The ids of the controllers of a QEMU that starts with disks on these buses."""
    has_namespaces = any(TABLE[bus].pool == "namespaces" for bus in buses)
    return [SCSI_CONTROLLER, *([NAMESPACE_CONTROLLER] if has_namespaces else [])]


# A read never meets a full disk. `enospc` is QEMU's default, which need not be said.
_ON_ERROR: dict[str, dict[str, object]] = {
    "": {},
    "report": {"werror": "report", "rerror": "report"},
    "stop": {"werror": "stop", "rerror": "stop"},
    "enospc": {},
}


def device(
    disk: Disk, *, device_id: str, node: str, place: Place, serial: str, thread: str | None = None
) -> dict[str, object]:
    """The properties of the device that makes `node` a disk, for device_add and for -device alike.

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
    if TABLE[disk.bus].stops:
        properties |= _ON_ERROR[disk.on_error]
    if disk.share:
        properties["share-rw"] = True
    if disk.boot_index >= 0:
        properties["bootindex"] = disk.boot_index
    return properties

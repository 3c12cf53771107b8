# SPDX-License-Identifier: LGPL-2.1-or-later
"""The buses: which QEMU device a drive becomes, and what the guest's udev calls it."""

from __future__ import annotations

from typing import NamedTuple

from .ports import Place


class Bus(NamedTuple):
    """How one bus is made. `by_id` is the name that udev's rules give the disk under /dev/disk/by-id."""

    driver: str
    pool: str
    by_id: str
    writable: bool = True


#: udev's 60-persistent-storage.rules: virtio-SERIAL; nvme-MODEL_SERIAL; scsi- and the name that scsi_id makes of VPD
#: page 0x83, for which QEMU puts a drive's serial into a vendor specific designator (type 0).
TABLE = {
    "virtio-blk": Bus("virtio-blk-pci", "pci", "virtio-{serial}"),
    "nvme": Bus("nvme", "pci", "nvme-QEMU_NVMe_Ctrl_{serial}"),
    "virtio-scsi": Bus("scsi-hd", "scsi", "scsi-0QEMU_QEMU_HARDDISK_{serial}"),
    "scsi-cd": Bus("scsi-cd", "scsi", "scsi-0QEMU_QEMU_CD-ROM_{serial}", writable=False),
}


def by_id_path(bus: str, serial: str) -> str:
    """The stable path of the drive in the guest."""
    return "/dev/disk/by-id/" + TABLE[bus].by_id.format(serial=serial)


def device(
    bus: str, *, device_id: str, node: str, place: Place, serial: str, boot_index: int = -1
) -> dict[str, object]:
    """The properties of the device that makes `node` a disk on `bus`, for device_add and for -device alike."""
    properties: dict[str, object] = {
        "driver": TABLE[bus].driver,
        "id": device_id,
        "drive": node,
        "serial": serial,
        **place.properties(),
    }
    if boot_index >= 0:
        properties["bootindex"] = boot_index
    return properties

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the options for boot disks, and for disks that are attached later."""

import argparse
from collections.abc import Iterator
from typing import TypedDict

from ...boot.config import MachineConfig
from ...host.storageprovider import Volume
from ...storage.disk import ON_ERROR_CHOICES, Disk, parse_extra_drive
from .. import volumes
from ..values import boolean, whole_number


class Disks(TypedDict):
    """Fields of MachineConfig."""

    discard_disk: bool
    extra_disks: tuple[Disk, ...]
    volumes: tuple[Volume, ...]
    on_error: str
    hotplug_ports: int | None


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options to the command's parser."""
    group = parser.add_argument_group("Disks")
    group.add_argument(
        "--discard-disk",
        metavar="BOOL",
        default="yes",
        help="give blocks that the guest discards back to the host (default: %(default)s)",
    )
    group.add_argument(
        "--extra-drive",
        metavar="[FORMAT:][DISKTYPE:]PATH",
        action="append",
        default=[],
        help="attach another disk; repeatable",
    )
    group.add_argument(
        "--bind-volume",
        metavar=volumes.SYNTAX,
        action="append",
        default=[],
        help="attach a volume of a systemd storage provider; repeatable",
    )
    group.add_argument(
        "--on-error",
        choices=ON_ERROR_CHOICES,
        default="",
        help="reaction to a failed request: report it to the guest, stop the guest, or stop the guest only if the "
        "host's disk is full (default)",
    )
    group.add_argument(
        "--hotplug-ports",
        metavar="N",
        type=whole_number,
        help="reserve ports for devices that are attached later (default: 8; pc: 27)",
    )


def read(options: argparse.Namespace) -> Disks:
    """Read the options. Raises UsageError."""
    bus = options.image_disk_type
    return {
        "discard_disk": boolean("--discard-disk=", options.discard_disk) == "yes",
        "extra_disks": tuple(parse_extra_drive(each, default_bus=bus) for each in options.extra_drive),
        "volumes": tuple(volumes.parse("--bind-volume=", each) for each in options.bind_volume),
        "on_error": options.on_error,
        "hotplug_ports": options.hotplug_ports,
    }


def without_effect(config: MachineConfig) -> Iterator[str]:
    """Yield a line for each option that has no effect on an optical disk."""
    if not config.image or config.image_disk_type != "scsi-cd":
        return
    given = {
        "--ephemeral": config.ephemeral,
        "--grow-image=": config.grow_image is not None,
        "--discard-disk=": not config.discard_disk,
    }
    for option in (option for option, is_given in given.items() if is_given):
        yield f"{option} has no effect with --image-disk-type=scsi-cd, which is read-only"

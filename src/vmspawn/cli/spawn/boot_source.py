# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the options that select the guest: the built-in guest, an image or a kernel."""

import argparse
import os
from typing import TypedDict

from ...storage.disk import BUSES
from ...storage.formats import FORMATS
from ..values import parse_size


class BootSource(TypedDict):
    """Fields of MachineConfig."""

    guest: str | None
    warm: bool
    image: str | None
    image_format: str | None
    image_disk_type: str
    ephemeral: bool
    grow_image: int | None
    linux: str | None
    modules: str | None
    initrd: str | None
    more_initrds: tuple[str, ...]
    kernel_arguments: tuple[str, ...]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options to the command's parser."""
    group = parser.add_argument_group("Boot")
    group.add_argument("--guest", choices=("builtin",), help="boot the small guest that vmspawn builds")
    group.add_argument(
        "--warm", action="store_true", help="start the built-in guest from a snapshot that was saved after its boot"
    )
    group.add_argument("-i", "--image", metavar="PATH", help="boot a disk image or block device")
    group.add_argument("--image-format", choices=FORMATS, help="format of the image (default: raw)")
    group.add_argument(
        "--image-disk-type",
        choices=BUSES,
        default=BUSES[0],
        help="bus of the image, and of extra disks without a bus (default: %(default)s)",
    )
    group.add_argument("-x", "--ephemeral", action="store_true", help="discard all changes to the image at the end")
    group.add_argument("-G", "--grow-image", metavar="BYTES", help="enlarge the image to this size before boot")
    group.add_argument("--linux", metavar="PATH", help="boot a kernel directly")
    group.add_argument(
        "--modules",
        metavar="PATH",
        help="modules of the kernel of --linux=, for the built-in guest (default: /lib/modules/VERSION)",
    )
    group.add_argument(
        "--initrd", metavar="PATH", action="append", default=[], help="initrd for --linux=; repeatable, joined in order"
    )


def read(options: argparse.Namespace) -> BootSource:
    """Read the options. Raises UsageError."""
    grow_image = options.grow_image
    # An empty path means no path, as in systemd-vmspawn.
    initrds = [os.path.abspath(each) for each in options.initrd if each]
    return {
        "guest": options.guest,
        "image": _absolute(options.image),
        "image_format": options.image_format,
        "image_disk_type": options.image_disk_type,
        "ephemeral": options.ephemeral,
        "grow_image": None if grow_image is None else parse_size(grow_image, option="--grow-image="),
        "linux": _absolute(options.linux),
        "modules": _absolute(options.modules),
        "warm": options.warm,
        "initrd": initrds[0] if initrds else None,
        "more_initrds": tuple(initrds[1:]),
        "kernel_arguments": tuple(options.kernel_arguments),
    }


def _absolute(path: str | None) -> str | None:
    return os.path.abspath(path) if path else None

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the options for the virtual hardware and for QEMU."""

import argparse
from typing import TypedDict

from ...boot.config import MACHINE_TYPES
from ...boot.memory import BACKINGS, SLOTS_DEFAULT, Growth
from ...errors import UsageError
from ..values import boolean, is_whole, parse_size, whole_number


class Machine(TypedDict):
    """Fields of MachineConfig."""

    cpus: int
    ram: int | None
    ram_growth: Growth | None
    ram_backing: str
    kvm: str
    machine_type: str
    qemu: str | None
    qemu_arguments: tuple[str, ...]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options to the command's parser."""
    group = parser.add_argument_group("Hardware")
    group.add_argument(
        "--cpus", metavar="N", type=whole_number, default=1, help="number of processors (default: %(default)s)"
    )
    group.add_argument(
        "--ram",
        metavar="BYTES[:MAX[:SLOTS]]",
        help="memory size with K, M, G or T, and its maximum (default: 2G; built-in guest: 256M)",
    )
    group.add_argument(
        "--ram-backing",
        choices=BACKINGS,
        default=BACKINGS[0],
        help="with file, keep the memory in a file, which copies of the machine share (default: %(default)s)",
    )
    group.add_argument("--kvm", metavar="BOOL|auto", default="auto", help="use KVM (default: %(default)s)")
    group.add_argument(
        "--machine-type", choices=MACHINE_TYPES, default="q35", help="QEMU's machine type (default: %(default)s)"
    )
    group.add_argument("--qemu", metavar="PATH", help="use this QEMU")
    group.add_argument(
        "--qemu-arg", metavar="ARG", action="append", default=[], help="pass an argument to QEMU; repeatable"
    )


def read(options: argparse.Namespace) -> Machine:
    """Read the options. Raises UsageError."""
    ram, growth = _memory(options.ram)
    return {
        "cpus": options.cpus,
        "ram": ram,
        "ram_growth": growth,
        "ram_backing": options.ram_backing,
        "kvm": boolean("--kvm=", options.kvm, auto=True),
        "machine_type": options.machine_type,
        "qemu": options.qemu,
        "qemu_arguments": tuple(options.qemu_arg),
    }


def _memory(text: str | None) -> tuple[int | None, Growth | None]:
    """Parse `--ram=SIZE[:MAX[:SLOTS]]`."""
    if text is None:
        return None, None
    size, *rest = text.split(":")
    ram = parse_size(size, option="--ram=")
    if not rest:
        return ram, None
    if len(rest) > 2 or (len(rest) == 2 and not is_whole(rest[1])):
        raise UsageError(f"--ram={text} is not a size", hint="write --ram=SIZE[:MAX[:SLOTS]]")
    slots = int(rest[1]) if len(rest) == 2 else SLOTS_DEFAULT
    return ram, Growth(parse_size(rest[0], option="--ram="), slots)

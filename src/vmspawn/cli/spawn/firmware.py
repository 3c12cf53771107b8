# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the options for the firmware, its features and its variables."""

import argparse
import os
from typing import TypedDict

from ...boot import firmware
from ...boot.firmware import FirmwareWish
from ...boot.qemu import ARCHITECTURES
from ...errors import StartError, UsageError
from ..values import boolean

_SECURE_BOOT = "secure-boot"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options to the command's parser."""
    group = parser.add_argument_group("Firmware")
    group.add_argument(
        "--firmware",
        metavar="auto|uefi|bios|none|PATH|list|describe",
        default="auto",
        help="boot with this kind of firmware, or the firmware of a descriptor; list prints the paths of all "
        "descriptors, describe prints the descriptor that would be used (default: %(default)s)",
    )
    group.add_argument(
        "--firmware-features",
        metavar="FEATURE[,FEATURE…]|list",
        action="append",
        default=[],
        help="require features of UEFI, or exclude those with ~; list prints the features; repeatable",
    )
    group.add_argument("--secure-boot", metavar="BOOL|auto", help="require or exclude Secure Boot")
    group.add_argument("--efi-nvram-template", metavar="PATH", help="initial contents of UEFI variables")
    group.add_argument(
        "--efi-nvram-state",
        metavar="off|auto|PATH",
        default="auto",
        help="file that keeps UEFI variables (default: auto, beside the image)",
    )


class Firmware(TypedDict):
    """Fields of MachineConfig."""

    firmware: FirmwareWish


def read(options: argparse.Namespace) -> Firmware:
    """Read the options. Raises UsageError."""
    return {"firmware": _wish(options)}


def _wish(options: argparse.Namespace) -> FirmwareWish:
    include, exclude = _features(options.firmware_features)
    if options.secure_boot is not None:
        choice = boolean("--secure-boot=", options.secure_boot, auto=True)
        include = [each for each in include if each != _SECURE_BOOT] + [_SECURE_BOOT] * (choice == "yes")
        exclude = [each for each in exclude if each != _SECURE_BOOT] + [_SECURE_BOOT] * (choice == "no")
    kind = options.firmware or "auto"
    if os.sep in kind:
        kind = _path("--firmware=", kind)
    template = options.efi_nvram_template
    state = options.efi_nvram_state or "auto"
    return FirmwareWish(
        kind,
        tuple(include),
        tuple(exclude),
        _path("--efi-nvram-template=", template) if template else None,
        state if state in ("auto", "off") else _path("--efi-nvram-state=", state),
    )


def _features(texts: list[str]) -> tuple[list[str], list[str]]:
    include: list[str] = []
    exclude = list(firmware.EXCLUDED)
    for text in texts:
        if not text:
            include, exclude = [], []
        for each in filter(None, text.split(",")):
            if each.startswith("~"):
                exclude.append(each[1:])
            else:
                include.append(each)
    return include, exclude


def _path(option: str, text: str) -> str:
    if not text.startswith(("/", "./")):
        raise UsageError(f"{option}{text} is not a path", hint="write a path that is absolute or begins with ./")
    return os.path.abspath(text)


def answer(options: argparse.Namespace) -> list[str] | None:
    """Return the lines to print instead of starting a machine, or None if the options start a machine.

    The lines list firmware, features, or the firmware that would be used. Raises StartError if no firmware fits.
    """
    if options.firmware == "list":
        return firmware.descriptors()
    if "list" in options.firmware_features:
        return firmware.features()
    if options.firmware != "describe":
        return None
    import json

    options.firmware = "uefi"
    found = firmware.select(_wish(options), ARCHITECTURES[options.machine_type], options.machine_type)
    if found is None:
        raise StartError("no UEFI firmware fits", hint="see: vmspawn --firmware=list")
    return [json.dumps(firmware.read(found.descriptor), indent=2)]

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds the kernel and the initrd in the root file system of a distribution.

Boot loader entries follow the UAPI group's Boot Loader Specification: unified kernel images in EFI/Linux, and `.conf`
files in loader/entries, both below the directory that the guest mounts at /efi, /boot or /boot/efi. Without entries,
the kernel is /boot/vmlinuz-*, where distributions install it.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from ..errors import StartError

_BOOT_DIRECTORIES = ("efi", "boot", "boot/efi")

#: The names that distributions give to the initrd of a kernel; `{}` is the kernel's version.
_INITRDS = ("initrd.img-{}", "initramfs-{}.img", "initrd-{}")


class Entry(NamedTuple):
    """A kernel and its initrds, as paths on the host."""

    linux: str
    initrds: tuple[str, ...]


def find(root: str) -> Entry:
    """Find the newest kernel below `root`: a unified image, else the kernel of an entry, else a bare kernel.

    Raises StartError if there is no kernel.
    """
    boots = [os.path.join(root, each) for each in _BOOT_DIRECTORIES]
    if images := [each for boot in boots for each in _files(os.path.join(boot, "EFI/Linux"), ".efi")]:
        return Entry(max(images, key=_version), ())
    entries = [
        (path, entry)
        for boot in boots
        for path in _files(os.path.join(boot, "loader/entries"), ".conf")
        if (entry := _read(path, boot)) is not None
    ]
    if entries:
        return max(entries, key=lambda each: _version(each[0]))[1]
    if kernels := [each for each in _files(os.path.join(root, "boot"), "") if "/vmlinuz-" in each]:
        return _bare(root, max(kernels, key=_version))
    raise StartError.with_fields(
        "{root} has no kernel: no boot loader entry below efi or boot, and no boot/vmlinuz-*",
        hint="name a kernel with {linux=}, and its initrd with {initrd=}",
        root=root,
    )


def _files(folder: str, suffix: str) -> list[str]:
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    return [os.path.join(folder, name) for name in names if name.endswith(suffix) and not name.startswith(".")]


def _version(path: str) -> list[tuple[int, str]]:
    """Return a key that sorts file names by version, so that 6.10 follows 6.9."""
    parts = re.findall(r"\d+|\D+", os.path.basename(path))
    return [(int(each), "") if each.isdigit() else (-1, each) for each in parts]


def _read(path: str, boot: str) -> Entry | None:
    """Read an entry, whose paths are relative to the boot directory. Returns None if the kernel is missing."""
    linux, initrds = "", []
    try:
        with open(path, "rb") as file:
            for line in file:
                key, _, value = os.fsdecode(line).strip().partition(" ")
                if key == "linux":
                    linux = value.strip()
                elif key == "initrd":
                    initrds.append(os.path.join(boot, value.strip().lstrip("/")))
    except OSError:
        return None
    kernel = os.path.join(boot, linux.lstrip("/"))
    return Entry(kernel, tuple(initrds)) if linux and os.path.isfile(kernel) else None


def _bare(root: str, kernel: str) -> Entry:
    version = os.path.basename(kernel).removeprefix("vmlinuz-")
    found = (os.path.join(root, "boot", name.format(version)) for name in _INITRDS)
    return Entry(kernel, tuple(path for path in found if os.path.exists(path))[:1])

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds a statically linked busybox for the built-in guest, on this host or in its distribution."""

from __future__ import annotations

import re
import struct
from pathlib import Path

from ..errors import GuestError
from ..search_path import find_program
from .packages import Fetcher, available

_PROGRAMS = ("busybox", "busybox.static", "busybox-static")
_PACKAGE = "busybox-static"

# The first version with `mdev -d`, which the guest's scripts use.
_OLDEST = (1, 31)

_ELF_MACHINES = {"x86_64": 62, "aarch64": 183}
_PT_INTERP = 3


def find_busybox(architecture: str, fetcher: Fetcher) -> bytes:
    """Return the content of a busybox that runs in the guest. Raises GuestError."""
    for program in _PROGRAMS:
        path = find_program(program)
        content = Path(path).read_bytes() if path else b""
        if is_usable(content, architecture):
            return content
    if not available():
        raise GuestError(
            f"cannot build the guest for {architecture}: no statically linked busybox with mdev is installed",
            hint="install the package busybox-static (Fedora: busybox)",
        )
    content = _busybox_in(fetcher.fetch(_PACKAGE))
    if not is_usable(content, architecture):
        raise GuestError("the distribution's busybox-static is too old, or has no mdev")
    return content


def is_usable(content: bytes, architecture: str) -> bool:
    """Return whether this is a static busybox for the architecture, with the applets that the guest's scripts use."""
    version = re.search(rb"BusyBox v(\d+)\.(\d+)", content)
    return (
        is_static(content, architecture)
        and version is not None
        and (int(version[1]), int(version[2])) >= _OLDEST
        and b"\0mdev\0" in content
    )


def is_static(content: bytes, architecture: str) -> bool:
    """Return whether this is a 64-bit ELF program for the architecture that needs no dynamic linker."""
    if content[:6] != b"\x7fELF\x02\x01" or len(content) < 64:
        return False
    (machine,) = struct.unpack_from("<H", content, 0x12)
    (table,) = struct.unpack_from("<Q", content, 0x20)
    size, count = struct.unpack_from("<HH", content, 0x36)
    types = [struct.unpack_from("<I", content, table + size * index)[0] for index in range(count)]
    return machine == _ELF_MACHINES[architecture] and _PT_INTERP not in types


def _busybox_in(tree: Path) -> bytes:
    for name in ("bin/busybox", "usr/bin/busybox"):
        if (tree / name).is_file():
            return (tree / name).read_bytes()
    raise GuestError(f"the distribution's package {_PACKAGE} has no busybox")

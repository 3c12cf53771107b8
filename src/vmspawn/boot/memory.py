# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checks the size and growth of the guest's memory, and writes QEMU's arguments for it."""

from __future__ import annotations

import os

from ..errors import StartError, UsageError
from ..record import Record
from .extras import Extras, Owned

#: The places of the guest's memory: anonymous memory of QEMU, or a file, which copies of the machine map.
BACKINGS = ("anonymous", "file")

#: The tmpfs in which the file with the guest's memory is created (shm_overview(7)).
_SHARED_MEMORY = "/dev/shm"

#: The number of slots for hot-plugged memory if the user sets only a maximum, as in systemd-vmspawn.
SLOTS_DEFAULT = 1
_SLOTS_MAX = 256


class Growth(Record):
    """The growth of the guest's memory at run time: up to `maximum` bytes in total, by up to `slots` modules.

        vmspawn.Machine(image="debian.raw", ram="1G", ram_growth=Growth(4 << 30, slots=3))

    The modules are plugged in by QMP: `object-add` with a memory backend, and `device_add` with pc-dimm.
    """

    maximum: int
    slots: int = SLOTS_DEFAULT


def check(size: int, growth: Growth | None) -> None:
    """Raise UsageError for a growth that is out of range."""
    if growth is None:
        return
    if growth.maximum <= size:
        raise UsageError.with_fields(
            "{ram_growth=} has a maximum of {maximum} bytes, which does not exceed the size of {size}",
            hint="use a larger maximum, or leave it out",
            maximum=growth.maximum,
            size=size,
        )
    if not 1 <= growth.slots <= _SLOTS_MAX:
        raise UsageError.with_fields(
            "{ram_growth=} has {count} slots", hint="use 1 to {most}", count=growth.slots, most=_SLOTS_MAX
        )


def size_argument(size: int, growth: Growth | None) -> str:
    """Return the value of QEMU's -m."""
    if growth is None:
        return f"size={size}B"
    return f"size={size}B,maxmem={growth.maximum}B,slots={growth.slots}"


def in_file(size: int, owned: Owned) -> Extras:
    """Return the arguments that keep the guest's memory in a file, and the file.

    The file has no name, so the kernel frees it when QEMU ends. The file grows as the guest uses its memory.
    Enough space for all of the memory must be free, because the kernel kills a QEMU that runs out of space. Raises
    StartError.
    """
    fd = owned.lend(_memory_file(size))
    backend = f"memory-backend-file,id=mem,size={size}B,mem-path=/proc/self/fd/{fd},share=on"
    return Extras(machine=("memory-backend=mem",), arguments=("-object", backend), descriptors=(fd,))


def _memory_file(size: int) -> int:
    try:
        fd = os.open(_SHARED_MEMORY, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        free = os.fstatvfs(fd)
    except OSError as error:
        raise StartError.with_fields(
            "cannot use {ram_backing=file}: {folder}: {reason}", folder=_SHARED_MEMORY, reason=error.strerror
        ) from None
    # A tmpfs without a limit reports no blocks.
    if free.f_blocks and free.f_bavail * free.f_frsize < size:
        os.close(fd)
        raise StartError.with_fields(
            "{ram_backing=file} needs {size} MiB in {folder}, and {free} MiB are free",
            hint="use less {ram=}, or leave out {ram_backing=}",
            size=size >> 20,
            folder=_SHARED_MEMORY,
            free=free.f_bavail * free.f_frsize >> 20,
        )
    return fd


def shared(size: int) -> Extras:
    """Return the arguments that let other processes map the guest's memory, as vhost-user devices do."""
    backend = f"memory-backend-memfd,id=mem,size={size}B,share=on"
    return Extras(machine=("memory-backend=mem",), arguments=("-object", backend))

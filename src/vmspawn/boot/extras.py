# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the arguments, descriptors and processes that one feature, such as the firmware, adds to a machine."""

from __future__ import annotations

import os
from contextlib import ExitStack

from ..helpers.helper import Helper
from ..hotplug.places import Layout, Place
from ..record import Record
from .overlay import BASE_FDSET

#: The descriptor sets of the firmware's flash. Disks have sets with larger numbers.
FLASH_FDSETS = (BASE_FDSET - 1, BASE_FDSET - 2)


class Extras(Record):
    """The additions of one feature to a machine."""

    #: Properties of `-machine`, such as `smm=on`.
    machine: tuple[str, ...] = ()
    #: Arguments of QEMU, each option followed by its value.
    arguments: tuple[str, ...] = ()
    #: The descriptors that QEMU inherits under the same numbers.
    descriptors: tuple[int, ...] = ()
    #: Arguments of the guest's kernel.
    kernel_arguments: tuple[str, ...] = ()
    #: Processes beside QEMU.
    helpers: tuple[Helper, ...] = ()


NO_EXTRAS = Extras()


def join(*parts: Extras) -> Extras:
    """Join the parts in their order."""
    return Extras(
        tuple(each for part in parts for each in part.machine),
        tuple(each for part in parts for each in part.arguments),
        tuple(each for part in parts for each in part.descriptors),
        tuple(each for part in parts for each in part.kernel_arguments),
        tuple(each for part in parts for each in part.helpers),
    )


class Owned(Record):
    """Closes the files that the steps of a start open, and ends their processes."""

    #: Unwound if the start fails.
    undo: ExitStack
    #: Unwound as soon as QEMU runs and has inherited the descriptors, or if the start fails.
    lent: ExitStack

    def lend(self, fd: int) -> int:
        """Return the descriptor, and close it as soon as QEMU has inherited it."""
        self.lent.callback(os.close, fd)
        return fd


def fdset(number: int, fd: int) -> Extras:
    """Pass a descriptor to QEMU as a descriptor set, which QEMU opens as `fdset_path(number)`."""
    return Extras(arguments=("-add-fd", f"fd={fd},set={number}"), descriptors=(fd,))


def fdset_path(number: int) -> str:
    """Return the file name of a descriptor set in QEMU."""
    return f"/dev/fdset/{number}"


def content(name: str, data: bytes, owned: Owned) -> tuple[str, Extras]:
    """Write data to a memory file. Returns the path with which QEMU opens the file, and the descriptor as Extras.

    Unlike arguments, the content is not shown by ps(1), and its size is not limited.
    """
    fd = owned.lend(os.memfd_create(f"vmspawn-{name}", os.MFD_CLOEXEC))
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return f"/proc/self/fd/{fd}", Extras(descriptors=(fd,))


def take_place(layout: Layout) -> Place:
    """Reserve a slot for a boot device. Raises NoFreePort."""
    place = layout.boot.take()
    layout.pci.claim(place)
    return place

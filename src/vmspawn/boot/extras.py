# SPDX-License-Identifier: LGPL-2.1-or-later
"""What firmware, network, directories and the like add to a machine, collected before its command line is written."""

from __future__ import annotations

import os

from ..helpers.helper import Helper
from .overlay import BASE_FDSET

#: The numbers of descriptor sets for other things than disks are below this one.
_FDSETS_END = BASE_FDSET


class Additions:
    """Arguments for QEMU and the guest, the descriptors that QEMU inherits for them, and processes that serve it.

    Owns the descriptors and the processes.
    """

    __slots__ = ("arguments", "descriptors", "helpers", "kernel_arguments", "machine", "vendor_strings")

    def __init__(self) -> None:
        #: Properties of `-machine`, such as `smm=on`.
        self.machine: list[str] = []
        #: More of QEMU's command line, each option followed by its value.
        self.arguments: list[str] = []
        #: What QEMU inherits, under the same numbers.
        self.descriptors: list[int] = []
        #: What the guest's kernel is told, in front of what the user says.
        self.kernel_arguments: list[str] = []
        #: SMBIOS type 11 strings, which the guest finds in /sys/firmware/dmi/entries/11-*.
        self.vendor_strings: list[bytes] = []
        #: Processes beside QEMU.
        self.helpers: list[Helper] = []

    def keep(self, fd: int) -> int:
        """Let QEMU inherit a descriptor, which is ours to close from now on. Returns it."""
        self.descriptors.append(fd)
        return fd

    def add_fdset(self, fd: int) -> str:
        """Give a descriptor to QEMU as a set of its own, and return the file name that stands for it there."""
        self.keep(fd)
        number = _FDSETS_END - len(self.descriptors)
        self.arguments += ["-add-fd", f"fd={fd},set={number}"]
        return f"/dev/fdset/{number}"

    def add_content(self, name: str, content: bytes) -> str:
        """Put content into a file in memory that has no other name, and return the path by which QEMU can open it.

        Unlike on the command line, others do not see it there, and no length is too much.
        """
        fd = os.memfd_create(f"vmspawn-{name}", os.MFD_CLOEXEC)
        self.keep(fd)
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
        return f"/proc/self/fd/{fd}"

    def close(self) -> None:
        """Close our descriptors; QEMU has its own by then. May be called again."""
        while self.descriptors:
            os.close(self.descriptors.pop())

    def end_helpers(self) -> None:
        """Kill the helpers that still run. May be called again."""
        while self.helpers:
            self.helpers.pop().close()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Holds the file descriptors that a client has passed, until a command uses them."""

from __future__ import annotations

import os


class PassedDescriptors:
    """A client's descriptors that no command has used. Owns them, and closes them in `close`.

    As in QEMU, one descriptor waits for a command, and a later descriptor replaces it. The replacement happens when the
    bytes that came with the later descriptor are scanned; commands before these bytes use the earlier descriptor.
    """

    __slots__ = ("_offset", "_waiting", "arriving")

    def __init__(self) -> None:
        self._waiting = -1
        #: The descriptor that came with bytes not scanned yet, or -1.
        self.arriving = -1
        # The offset of these bytes in the client's stream.
        self._offset = 0

    def receive(self, fd: int, offset: int) -> None:
        """Take a descriptor that came with the bytes at an offset of the client's stream."""
        self.settle()
        self.arriving, self._offset = fd, offset

    def scanned(self, offset: int) -> None:
        """Let the arriving descriptor wait for a command if the bytes that it came with begin before `offset`."""
        if offset > self._offset:
            self.settle()

    def settle(self) -> None:
        """Let the arriving descriptor, if any, wait for a command, in place of an earlier one, which is closed."""
        if self.arriving >= 0:
            close(self._waiting)
            self._waiting, self.arriving = self.arriving, -1

    def take(self) -> int:
        """Return the waiting descriptor, or -1. The caller owns it."""
        fd, self._waiting = self._waiting, -1
        return fd

    def give_back(self, fd: int) -> None:
        """Let a descriptor that QEMU has not used wait for the next command, unless a later one waits."""
        if self._waiting < 0:
            self._waiting = fd
        else:
            close(fd)

    def close(self) -> None:
        """Close the descriptors. May be called again."""
        close(self._waiting)
        close(self.arriving)
        self._waiting = self.arriving = -1


def close(fd: int) -> None:
    """Close a descriptor, unless it is -1."""
    if fd >= 0:
        os.close(fd)

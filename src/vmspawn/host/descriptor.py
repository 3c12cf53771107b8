# SPDX-License-Identifier: LGPL-2.1-or-later
"""Owns a file descriptor, and closes it once, unless another owner has taken it."""

from __future__ import annotations

import os


class Descriptor:
    """An owned file descriptor. `take` passes it to another owner."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def take(self) -> int:
        """Return the descriptor, which the caller owns from now on."""
        fd, self.fd = self.fd, -1
        return fd

    def close(self) -> None:
        """Close the descriptor. May be called again, and after `take`."""
        if self.fd >= 0:
            os.close(self.take())

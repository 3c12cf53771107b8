# SPDX-License-Identifier: LGPL-2.1-or-later
"""What can go wrong, as one tree of exceptions.

Each leaf stands for one answer that a caller can act upon, and the control socket sends each as one Varlink error
(`control/errors.py`). A message is one line: what failed and why. A hint, where there is one, says what to do.
"""

from __future__ import annotations

import errno as errno_names
import os


class VmspawnError(Exception):
    """The root of all that this package raises on purpose.

    `hint` is a second line for people: what to do about it, or an empty string.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(VmspawnError):
    """An option or argument that cannot be meant; the commands exit with 2."""


class StartError(VmspawnError):
    """The machine could not be started; nothing of it is left behind."""


class GuestError(StartError):
    """The built-in guest could not be found or built."""


class NotConnected(VmspawnError):
    """QEMU is gone, or does not answer on its monitor any more."""


class ManagerFailed(VmspawnError):
    """The manager met what it was not made for. Its machine runs on without it."""


class Timeout(VmspawnError):
    """Something did not come before its deadline; the message says what."""


class EventsLost(VmspawnError):
    """A reader of events was so slow that some were dropped; the stream ends there."""


class QmpError(VmspawnError):
    """QEMU answered a command with an error.

    `error_class` and `description` are QEMU's own words (docs/interop/qmp-spec.rst, "Error").
    """

    def __init__(self, command: str, error_class: str, description: str) -> None:
        super().__init__(f"QEMU refused {command}: {description}")
        self.command = command
        self.error_class = error_class
        self.description = description


class NotSupported(VmspawnError):
    """This machine cannot do that, whatever the arguments."""


class NoSuchStorage(VmspawnError):
    """No disk of that name is attached."""


class StorageExists(VmspawnError):
    """The name is taken, or the same file is attached already."""


class StorageImmutable(VmspawnError):
    """The disk was there from boot and cannot be changed while the machine runs."""


class StoragePending(VmspawnError):
    """The guest has not let go of the disk yet; the removal goes on and completes late."""


class BadConfig(VmspawnError):
    """A disk's configuration is not one that exists."""


class ConfigNotSupported(VmspawnError):
    """A disk's configuration exists, but not on this machine."""


class NoFreePort(VmspawnError):
    """Every port of the machine that could take the device is in use."""


class SystemFailure(VmspawnError):
    """The operating system refused; `errno` says why, as in errno(3)."""

    def __init__(self, message: str, errno: int, *, hint: str = "") -> None:
        super().__init__(f"{message}: {os.strerror(errno)}", hint=hint)
        self.errno = errno

    @property
    def errno_name(self) -> str:
        """The symbolic name of the error, such as `ENOENT`."""
        return errno_names.errorcode.get(self.errno, "EIO")

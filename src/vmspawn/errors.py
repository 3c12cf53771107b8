# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines all errors of this package, as one tree of exceptions.

There is one class for each thing that a caller can do about an error, and the control socket sends each class as one
Varlink error (`control/errors.py`). A message is one line: what failed and why. A hint is one more line: what to do.

A message names a field in the caller's spelling: `machine_type='x'` for Python, `--machine-type=x` on the command line.
`with_fields` takes templates for that:

    UsageError.with_fields("{cpus={count}} is out of range", hint="use 1 to {most}, or {kvm=no}", count=500, most=255)

    {count}          the value `count`; variable text is always passed in this way
    {cpus=}          the field `cpus`, by its name alone
    {kvm=no}         the field `kvm` with the value "no"
    {ephemeral=True} the field `ephemeral` with the value True, a switch on the command line
    {cpus={count}}   the field `cpus` with the value `count`

A value may be another error. In a message, that error's message replaces the placeholder; in a hint, its hint does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from errno import errorcode
from typing import Self

from .record import Record
from .text import printable

#: Spells a field with its value, or by its name alone if the value is None.
Spelling = Callable[[str, object], str]

#: A placeholder's pattern, as text. It is compiled with the first error, because most starts have no error.
_PLACEHOLDER = r"\{([a-z_.]+)(?:(=)(?:\{([a-z_]+)\}|([^{}]*)))?\}"


def as_keyword(field: str, value: object = None) -> str:
    """Spell a field for Python: `cpus=500`, or `cpus=` for its name alone."""
    return f"{field}=" if value is None else f"{field}={value!r}"


class Template(Record):
    """The message and hint of an error, with placeholders, and the values for them."""

    message: str
    hint: str
    values: Mapping[str, object]

    def spelled(self, spelling: Spelling) -> tuple[str, str]:
        """Return the message and the hint with all placeholders replaced. Raises KeyError for a missing value."""
        return self._fill(self.message, spelling, 0), self._fill(self.hint, spelling, 1)

    def _fill(self, template: str, spelling: Spelling, part: int) -> str:
        def replace(found: re.Match[str]) -> str:
            name, is_field, value_name, literal = found.groups()
            if is_field:
                return spelling(name, self.values[value_name] if value_name else _LITERALS.get(literal, literal))
            value = self.values[name]
            return value.spelled(spelling)[part] if isinstance(value, VmspawnError) else str(value)

        return re.sub(_PLACEHOLDER, replace, template)


#: Values in a template that are not strings.
_LITERALS = {"": None, "True": True, "False": False}


class VmspawnError(Exception):
    """The root of all errors that this package raises on purpose. Only its subclasses are raised.

    `str(error)` is the failure and its reason. `hint` is advice, or empty; tracebacks show it as a note.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
        self.template: Template | None = None
        self._prefix, self._replaced = "", ""
        if hint:
            self.add_note(hint)

    @classmethod
    def with_fields(cls, message: str, *, hint: str = "", **values: object) -> Self:
        """Make an error from templates for the message and the hint; the module's docstring describes them."""
        template = Template(message, hint, values)
        spelled, spelled_hint = template.spelled(as_keyword)
        error = cls(spelled, hint=spelled_hint)
        error.template = template
        return error

    def spelled(self, spelling: Spelling) -> tuple[str, str]:
        """Return the message and the hint, with fields spelled by `spelling`."""
        if self.template is None:
            return str(self), self.hint
        message, hint = self.template.spelled(spelling)
        return self._prefixed(message), hint

    def prefix(self, text: str, *, instead_of: str = "") -> None:
        """Put `text` in front of the message. If the message begins with `instead_of`, replace this beginning."""
        self._prefix, self._replaced = text, instead_of

    def __str__(self) -> str:
        return self._prefixed(super().__str__())

    def _prefixed(self, message: str) -> str:
        return self._prefix + message.removeprefix(self._replaced)


class UsageError(VmspawnError):
    """An option or argument is invalid, or contradicts another. The commands exit with 2."""


class StartError(VmspawnError):
    """The machine could not be started. Nothing of it remains."""


class GuestError(StartError):
    """The built-in guest could not be found or built."""


class NotInstalled(VmspawnError):
    """A required program or module is not installed on this host."""


class ProtocolError(VmspawnError):
    """A service violated its protocol."""


class VolumeError(VmspawnError):
    """A storage provider did not provide a volume."""


class MachineEnded(VmspawnError):
    """The machine ended before it completed the operation."""


class NotConnected(VmspawnError):
    """QEMU has ended, or no longer answers on its monitor."""


class ManagerFailed(VmspawnError):
    """The manager failed because of a bug. Its machine continues without a manager."""


class Timeout(VmspawnError):
    """An answer or event did not come before its deadline. The message names it."""


class CommandFailed(VmspawnError):
    """A command in the guest failed, or could not be started.

    `status` is as in a shell: 128 + N if signal N ended the command, 126 or 127 if it was not started. `stdout` and
    `stderr` are the command's output.
    """

    def __init__(self, message: str, *, status: int, stdout: bytes = b"", stderr: bytes = b"") -> None:
        super().__init__(message)
        self.status = status
        self.stdout = stdout
        self.stderr = stderr

    @classmethod
    def of(cls, status: int, stdout: bytes, stderr: bytes) -> Self:
        """Make the error for a command that has ended."""
        lines = stderr.decode(errors="replace").splitlines()
        last = next((f": {printable(line)}" for line in reversed(lines) if line.strip()), "")
        how = f"was ended by signal {status - 128}" if status > 128 else f"failed with status {status}"
        return cls(f"the command {how}{last}", status=status, stdout=stdout, stderr=stderr)


class CopyFailed(VmspawnError):
    """Files could not be copied to or from the guest. No incomplete file is left under a final name."""


class EventsLost(VmspawnError):
    """Events were dropped because their reader was too slow. The stream ends there."""


class ExtrasError(VmspawnError):
    """The man pages, the completion scripts or the systemd unit cannot be installed or removed."""


class QmpError(VmspawnError):
    """QEMU answered a command with an error.

    `error_class` and `description` are QEMU's text (QEMU's docs/interop/qmp-spec.rst, "Error").
    """

    def __init__(self, command: str, error_class: str, description: str) -> None:
        super().__init__(f"QEMU refused {command}: {description}")
        self.command = command
        self.error_class = error_class
        self.description = description


class NotSupported(VmspawnError):
    """The machine does not support the operation, whatever its arguments are."""


class NoSuchStorage(VmspawnError):
    """No attached disk has that name."""


class StorageExists(VmspawnError):
    """A disk with that name, or the same file, is attached already."""


class StorageImmutable(VmspawnError):
    """The disk was attached at boot, so it cannot be detached or replaced while the machine runs."""


class StoragePending(VmspawnError):
    """The guest has not released the disk yet. The removal continues and completes later."""


class BadConfig(VmspawnError):
    """A disk's configuration is not valid on any machine."""


class ConfigNotSupported(VmspawnError):
    """A disk's configuration is valid, but this machine does not support it."""


class PortInUse(VmspawnError):
    """Another process uses the port of the host."""


class NoSuchForward(VmspawnError):
    """No port of the host is forwarded to the guest under that address and number."""


class NoFreePort(VmspawnError):
    """All of the machine's ports for the device or for commands are in use."""


class NoSuchSnapshot(VmspawnError):
    """There is no snapshot of that name."""


class SnapshotExists(VmspawnError):
    """A snapshot of that name exists already."""


class SnapshotInUse(VmspawnError):
    """A machine or another snapshot uses the snapshot, or the image to be written is part of a snapshot."""


class SnapshotBlocked(VmspawnError):
    """A device, a disk or the state of the guest cannot be saved."""


class SystemFailure(VmspawnError):
    """A system call failed. `errno` is its error number, as in errno(3)."""

    def __init__(self, message: str, errno: int, *, hint: str = "") -> None:
        super().__init__(f"{message}: {os.strerror(errno)}", hint=hint)
        self.errno = errno

    @property
    def errno_name(self) -> str:
        """The symbolic name of the error, such as `ENOENT`."""
        return errorcode.get(self.errno, "EIO")

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the steps of an attachment, each with its undo.

A step belongs to one attachment and holds the values that it works with. A step in the journal may have begun without
completing, or a manager may have undone the step and died. So an undo takes "not found" as success.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..qmp.monitor import Command
from .places import Place, Pool
from .qemu_objects import QemuObject

#: The name of the step that plugs in the device, the last step of every attachment.
DEVICE = "device"


class Step:
    """One reversible step."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        """Make a step. `name` is the step's name in the journal."""
        self.name = name

    @property
    def is_needed(self) -> bool:
        """True if the attachment needs this step."""
        return True

    def begin(self) -> Sequence[Command]:
        """Do the manager's part of the step; returns the commands that do QEMU's part."""
        return ()

    def spent(self) -> Sequence[QemuObject]:
        """Return the objects that are needed only to perform the step. Their removal is sent after the commands."""
        return ()

    def made(self) -> None:
        """Record that QEMU's part is done, and that the spent objects are removed."""

    def restore(self) -> None:
        """Do the manager's part of a step that another manager has done."""

    def objects(self) -> Sequence[QemuObject]:
        """Return the objects in QEMU that an undo of the step removes, in the order of removal."""
        return ()

    def end(self) -> None:
        """Undo the manager's part, after QEMU's part is undone."""


class Reserve(Step):
    """Reserves a place for the device."""

    __slots__ = ("_place", "_pool")

    def __init__(self, place: Place, pool: Pool) -> None:
        super().__init__("place")
        self._place = place
        self._pool = pool

    def begin(self) -> Sequence[Command]:
        self._pool.claim(self._place)
        return ()

    def restore(self) -> None:
        self._pool.claim(self._place)

    def end(self) -> None:
        self._pool.release(self._place)


class Make(Step):
    """Makes one object by one command."""

    __slots__ = ("_command", "_object")

    def __init__(self, name: str, command: Command, made: QemuObject) -> None:
        super().__init__(name)
        self._command = command
        self._object = made

    def begin(self) -> Sequence[Command]:
        return (self._command,)

    def objects(self) -> Sequence[QemuObject]:
        return (self._object,)


class PlugIn(Step):
    """Plugs in the device. Its undo is in `unplug`, because it needs the guest and may never complete."""

    __slots__ = ("_properties",)

    def __init__(self, properties: dict[str, object]) -> None:
        super().__init__(DEVICE)
        self._properties = properties

    def begin(self) -> Sequence[Command]:
        return (Command("device_add", self._properties),)

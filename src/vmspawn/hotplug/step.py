# SPDX-License-Identifier: LGPL-2.1-or-later
"""The steps of an attachment, each with what takes it back.

A step belongs to one attachment and holds the values that it works with. It may have been begun only, or undone before
by a process that then died, so an undo takes "not there" as done.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..qmp.monitor import Command
from .places import Place, Pool
from .qemu_objects import QemuObject

#: The name of the step that plugs the device in, which is the last one of every attachment.
DEVICE = "device"


class Step:
    """One reversible step."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        """`name` stands for the step in the journal."""
        self.name = name

    @property
    def is_needed(self) -> bool:
        """Whether the attachment needs this step."""
        return True

    def begin(self) -> Sequence[Command]:
        """Do our part of the step; returns the commands that are QEMU's part."""
        return ()

    def spent(self) -> Sequence[QemuObject]:
        """Objects that only the making needs. Their removal is sent behind the commands."""
        return ()

    def made(self) -> None:
        """QEMU has done its part, and removed what was spent."""

    def restore(self) -> None:
        """Redo our part of a step that another process has done."""

    def objects(self) -> Sequence[QemuObject]:
        """What QEMU has of the step and removes when told to, from the top down."""
        return ()

    def end(self) -> None:
        """Take back our part, once QEMU has nothing of the step any more."""


class Reserve(Step):
    """Reserve a place for the device."""

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
    """Make one object by one command."""

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
    """Plug the device in. Its undo needs the guest and may take for ever: that is `unplug`."""

    __slots__ = ("_properties",)

    def __init__(self, properties: dict[str, object]) -> None:
        super().__init__(DEVICE)
        self._properties = properties

    def begin(self) -> Sequence[Command]:
        return (Command("device_add", self._properties),)

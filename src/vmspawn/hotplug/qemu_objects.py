# SPDX-License-Identifier: LGPL-2.1-or-later
"""What QEMU has beside devices (objects, character devices, descriptors), and its removal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..errors import QmpError
from ..qmp.monitor import Command, Monitor


class Kind(NamedTuple):
    """How QEMU removes and lists one kind of object.

    `remove` takes the name as `argument`. `query`, with `options`, lists entries that have the name as `key`; it is
    empty for a kind that QEMU cannot list.
    """

    remove: str
    argument: str
    query: str = ""
    key: str = ""
    options: tuple[tuple[str, object], ...] = ()
    #: Whether QEMU 7.2 puts the removal off while the guest does not run.
    is_deferred: bool = False


#: Objects made by object-add.
OBJECT = Kind("object-del", "id", "qom-list", "name", (("path", "/objects"),))
#: Character devices made by chardev-add.
CHARDEV = Kind("chardev-remove", "id", "query-chardev", "label")
#: Descriptor sets made by add-fd.
FDSET = Kind("remove-fd", "fdset-id", "query-fdsets", "fdset-id", is_deferred=True)
#: Descriptors named by getfd, which the command that uses one consumes.
DESCRIPTOR = Kind("closefd", "fdname")


class QemuObject(NamedTuple):
    """One object. A descriptor set's name is its number."""

    kind: Kind
    name: str | int

    @property
    def removal(self) -> Command:
        """The command that removes it."""
        return Command(self.kind.remove, {self.kind.argument: self.name})

    async def is_there(self, monitor: Monitor) -> bool:
        """Whether QEMU has it. What cannot be listed counts as gone: only then does QEMU refuse its removal."""
        if not self.kind.query:
            return False
        found: list[dict[str, Any]] = await monitor.execute(self.kind.query, dict(self.kind.options))
        return any(each.get(self.kind.key) == self.name for each in found)


async def remove_objects(monitor: Monitor, objects: Sequence[QemuObject]) -> None:
    """Remove objects in that order. One that is not there counts as removed.

    Raises what `Monitor.execute` raises, QmpError if QEMU does not let go of one; others may be gone then.
    """
    if not objects:
        return
    results = await monitor.execute_all([each.removal for each in objects])
    for each, result in zip(objects, results, strict=True):
        if isinstance(result, QmpError) and await each.is_there(monitor):
            raise result


async def device_ids(monitor: Monitor) -> frozenset[str]:
    """The ids of QEMU's devices. Raises what `Monitor.execute` raises."""
    return await children(monitor, "/machine/peripheral")


async def children(monitor: Monitor, path: str) -> frozenset[str]:
    """The names of what is at a path of QEMU's object tree. Raises what `Monitor.execute` raises."""
    found: list[dict[str, Any]] = await monitor.execute("qom-list", {"path": path})
    return frozenset(str(each["name"]) for each in found)

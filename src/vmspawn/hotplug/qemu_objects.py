# SPDX-License-Identifier: LGPL-2.1-or-later
"""Removes QEMU's objects, character devices and descriptors, and lists its devices and objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..errors import QmpError
from ..qmp.monitor import Command, Monitor


class Kind(NamedTuple):
    """The commands by which QEMU removes and lists one kind of object.

    `remove` takes the name as `argument`. `query`, with the arguments `options`, lists the objects; the member `key` of
    each entry is the name. `query` is empty for a kind that QEMU cannot list.
    """

    remove: str
    argument: str
    query: str = ""
    key: str = ""
    options: tuple[tuple[str, object], ...] = ()
    #: True if QEMU 7.2 delays the removal while the guest does not run.
    is_deferred: bool = False


#: Objects made by object-add.
OBJECT = Kind("object-del", "id", "qom-list", "name", (("path", "/objects"),))
#: Character devices made by chardev-add.
CHARDEV = Kind("chardev-remove", "id", "query-chardev", "label")
#: Descriptor sets made by add-fd.
FDSET = Kind("remove-fd", "fdset-id", "query-fdsets", "fdset-id", is_deferred=True)
#: Descriptors named by getfd. A command that uses a descriptor removes the name.
DESCRIPTOR = Kind("closefd", "fdname")


class QemuObject(NamedTuple):
    """An object in QEMU. A descriptor set's name is its number."""

    kind: Kind
    name: str | int

    @property
    def removal(self) -> Command:
        """The command that removes the object."""
        return Command(self.kind.remove, {self.kind.argument: self.name})

    async def is_there(self, monitor: Monitor) -> bool:
        """Return whether QEMU has the object. Raises what `Monitor.execute` raises.

        An object that QEMU cannot list counts as missing: QEMU refuses its removal only if it is missing.
        """
        if not self.kind.query:
            return False
        found: list[dict[str, Any]] = await monitor.execute(self.kind.query, dict(self.kind.options))
        return any(each.get(self.kind.key) == self.name for each in found)


async def remove_objects(monitor: Monitor, objects: Sequence[QemuObject]) -> None:
    """Remove objects in the given order. A missing object counts as removed.

    Raises what `Monitor.execute` raises, or QmpError if QEMU refuses a removal; the other objects may then be removed.
    """
    if not objects:
        return
    results = await monitor.execute_all([each.removal for each in objects])
    for each, result in zip(objects, results, strict=True):
        if isinstance(result, QmpError) and await each.is_there(monitor):
            raise result


async def device_ids(monitor: Monitor) -> frozenset[str]:
    """Return the ids of QEMU's devices. Raises what `Monitor.execute` raises."""
    return await children(monitor, "/machine/peripheral")


async def children(monitor: Monitor, path: str) -> frozenset[str]:
    """Return the names of the children of a path in QEMU's object tree. Raises what `Monitor.execute` raises."""
    found: list[dict[str, Any]] = await monitor.execute("qom-list", {"path": path})
    return frozenset(str(each["name"]) for each in found)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a disk consists of inside QEMU, apart from its device, and the removal of that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from ..errors import QmpError
from ..qmp.monitor import Command, Monitor


class Part(NamedTuple):
    """One of them: a block node, a user-created object, or a descriptor set, whose name is its number."""

    kind: Literal["node", "object", "fdset"]
    name: str | int

    @property
    def removal(self) -> Command:
        """The command that removes it."""
        match self.kind:
            case "node":
                return Command("blockdev-del", {"node-name": self.name})
            case "object":
                return Command("object-del", {"id": self.name})
            case "fdset":
                return Command("remove-fd", {"fdset-id": self.name})

    async def is_there(self, monitor: Monitor) -> bool:
        """Whether QEMU has it."""
        match self.kind:
            case "node":
                nodes: list[dict[str, Any]] = await monitor.execute("query-named-block-nodes", {"flat": True})
                return any(node.get("node-name") == self.name for node in nodes)
            case "object":
                objects: list[dict[str, Any]] = await monitor.execute("qom-list", {"path": "/objects"})
                return any(entry["name"] == self.name for entry in objects)
            case "fdset":
                fdsets: list[dict[str, Any]] = await monitor.execute("query-fdsets")
                return any(fdset["fdset-id"] == self.name for fdset in fdsets)


async def remove_parts(monitor: Monitor, parts: Sequence[Part]) -> None:
    """Remove them, from the first to the last. What is not there is fine.

    Raises what `Monitor.execute` raises, QmpError if there is one that QEMU does not let go of; others may be gone
    then.
    """
    if not parts:
        return
    results = await monitor.execute_all([part.removal for part in parts])
    for part, result in zip(parts, results, strict=True):
        if isinstance(result, QmpError) and await part.is_there(monitor):
            raise result

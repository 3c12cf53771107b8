# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds the objects that a test left behind: in QEMU while the machine runs, and on the host after its end."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from ..errors import VmspawnError
from ..host import runtime
from ..machine.running import Running
from ..storage.recovery import names_of


class UnownedObjects(NamedTuple):
    """The objects in QEMU that belong to no disk of the machine."""

    nodes: frozenset[str]
    fdsets: frozenset[int]

    @classmethod
    async def of(cls, running: Running) -> UnownedObjects:
        """Ask QEMU for the objects. A machine that does not run has none."""
        try:
            nodes: Any = await running.monitor.execute("query-named-block-nodes", {"flat": True})
            fdsets: Any = await running.monitor.execute("query-fdsets")
        except VmspawnError:
            return cls(frozenset(), frozenset())
        owned = {name for attached in running.storage for name in names_of(attached)}
        names = frozenset(str(node["node-name"]) for node in nodes)
        # QEMU keeps the descriptor set of an image that it may reopen, for example read-only.
        used = {image.fdset for attached in running.storage for image in attached.images}
        return cls(names - owned, frozenset(int(each["fdset-id"]) for each in fdsets) - used)

    def since(self, before: UnownedObjects) -> list[str]:
        """Return descriptions of the objects that did not exist `before`."""
        found = [f"block node {name}" for name in sorted(self.nodes - before.nodes)]
        return found + [f"descriptor set {number}" for number in sorted(self.fdsets - before.fdsets)]


def outside(directory: str | os.PathLike[str], pids: list[int]) -> list[str]:
    """Return descriptions of the files and processes that remain of a machine that has ended."""
    found = [f"process {pid}" for pid in pids if runtime.start_time(pid)]
    return found + ([f"directory {os.fspath(directory)}"] if os.path.exists(directory) else [])

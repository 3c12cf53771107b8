# SPDX-License-Identifier: LGPL-2.1-or-later
"""Find what a test left behind: in QEMU while the machine runs, and on the host once it has ended."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from ..errors import VmspawnError
from ..host import runtime
from ..machine.running import Running
from ..storage.recovery import names_of


class Inside(NamedTuple):
    """What QEMU has that belongs to no disk of the machine."""

    nodes: frozenset[str]
    fdsets: frozenset[int]

    @classmethod
    async def of(cls, running: Running) -> Inside:
        """Ask QEMU. A machine that does not run has nothing."""
        try:
            nodes: Any = await running.monitor.execute("query-named-block-nodes", {"flat": True})
            fdsets: Any = await running.monitor.execute("query-fdsets")
        except VmspawnError:
            return cls(frozenset(), frozenset())
        owned = {name for attached in running.storage for name in names_of(attached)}
        names = frozenset(str(node["node-name"]) for node in nodes)
        # QEMU keeps the set of an image that it may open anew, such as a read-only one.
        used = {image.fdset for attached in running.storage for image in attached.images}
        return cls(names - owned, frozenset(int(each["fdset-id"]) for each in fdsets) - used)

    def since(self, before: Inside) -> list[str]:
        """What has come since, in words."""
        found = [f"block node {name}" for name in sorted(self.nodes - before.nodes)]
        return found + [f"descriptor set {number}" for number in sorted(self.fdsets - before.fdsets)]


def outside(directory: str | os.PathLike[str], pids: list[int]) -> list[str]:
    """What is left of a machine that has ended, in words."""
    found = [f"process {pid}" for pid in pids if runtime.start_time(pid)]
    return found + ([f"directory {os.fspath(directory)}"] if os.path.exists(directory) else [])

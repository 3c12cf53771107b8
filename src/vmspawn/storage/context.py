# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bundles the objects that operations on disks need: the hot-plug mechanism, the places and the disks."""

from __future__ import annotations

from typing import Any, Final

from ..errors import NoSuchStorage
from ..hotplug.hotplug import Hotplug
from ..hotplug.places import Layout
from ..hotplug.register import Register
from ..qmp.monitor import Monitor
from ..qmp.run_state import RunState
from .attached_disk import AttachedDisk
from .controllers import Controllers

#: The number of disks that the error about an unknown disk lists.
_NAMED = 8


class Context:
    """The objects that operations on one machine's disks need."""

    def __init__(
        self, hotplug: Hotplug, layout: Layout, controllers: Controllers, register: Register[AttachedDisk]
    ) -> None:
        self.hotplug: Final = hotplug
        self.layout: Final = layout
        self.controllers: Final = controllers
        self.register: Final = register

    @property
    def monitor(self) -> Monitor:
        """The manager's monitor."""
        return self.hotplug.monitor

    @property
    def run_state(self) -> RunState:
        """QEMU's run state."""
        return self.hotplug.run_state

    def find(self, name: str) -> AttachedDisk:
        """Return the disk of that name. Raises NoSuchStorage."""
        found = self.register.get(name)
        if found is None:
            raise NoSuchStorage(f"there is no disk named {name}", hint=self._names_hint())
        return found

    def _names_hint(self) -> str:
        names = [each.name for each in self.register]
        if not names:
            return "the machine has no disks"
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return f"its disks: {', '.join(names[:_NAMED])}{more}"

    async def virtual_size(self, node: str) -> int:
        """Return the bytes of a node's content. Raises KeyError if there is no node of that name."""
        found: list[dict[str, Any]] = await self.monitor.execute("query-named-block-nodes", {"flat": True})
        sizes = {each.get("node-name"): int(each["image"]["virtual-size"]) for each in found}
        return sizes[node]

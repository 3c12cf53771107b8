# SPDX-License-Identifier: LGPL-2.1-or-later
"""What all work on disks needs: QEMU's monitor, the places, and the removal of what may be gone already."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ..hotplug import places
from ..hotplug.places import Layout, Place, Pool
from ..qmp.events import Event
from ..qmp.monitor import Monitor
from ..qmp.run_state import RunState
from . import buses
from .attached_disk import AttachedDisk, State
from .qemu_objects import Part, remove_parts


class Context:
    """What the steps work on.

    `journal` is told which disk has changed, or None for any, and must have saved the register when it returns.
    """

    def __init__(
        self, monitor: Monitor, run_state: RunState, layout: Layout, journal: Callable[[AttachedDisk | None], None]
    ) -> None:
        self.monitor = monitor
        self.run_state = run_state
        self.layout = layout
        self._journal = journal
        #: Descriptor sets whose removal QEMU 7.2 puts off until the guest runs again.
        self.deferred_fdsets: set[Part] = set()
        #: The targets of the SCSI controller with an I/O thread, once there is one.
        self.threaded_scsi: Pool | None = None
        #: Where that controller is plugged in, once that was begun.
        self.threaded_place: Place | None = None
        self.threading_scsi = asyncio.Lock()
        #: Told of each request to the guest to let a disk go.
        self.removal_requested: Callable[[AttachedDisk], None] = lambda _: None
        self._next_number = 0

    @property
    def next_number(self) -> int:
        """The smallest number that nothing in QEMU was ever named by."""
        return self._next_number

    def fresh_number(self) -> int:
        """A number that nothing in QEMU was ever named by."""
        self._next_number += 1
        return self._next_number - 1

    def numbers_used_up_to(self, number: int) -> None:
        """Names with these numbers were given elsewhere."""
        self._next_number = max(self._next_number, number + 1)

    def pool(self, attachment: AttachedDisk) -> Pool:
        """Where the attachment's place belongs."""
        if attachment.place.bus == f"{places.THREADED_SCSI_CONTROLLER}.0":
            assert self.threaded_scsi is not None
            return self.threaded_scsi
        match buses.TABLE[attachment.disk.bus].pool:
            case "scsi":
                return self.layout.scsi
            case "namespaces":
                return self.layout.namespaces
            case _:
                return self.layout.pci

    # The journal. What it says of a disk is never less than what there is, and may be more, for an undo takes "not
    # there" as done. So a disk that comes is entered once, with all its steps, and one that goes is struck in the end.

    def journal(self, changed: AttachedDisk | None = None) -> None:
        """Save the register, in which a disk has changed, or any may have."""
        self._journal(changed)

    def journal_begun(self, attachment: AttachedDisk) -> None:
        """Save a step ahead of doing it."""
        if attachment.state is not State.ATTACHING:
            self._journal(attachment)

    def journal_undone(self, attachment: AttachedDisk) -> None:
        """Save that a step was undone."""
        if attachment.state is State.ATTACHED:
            self._journal(attachment)

    def publish(self, event: str, attachment: AttachedDisk, **data: Any) -> None:
        """An event of our own about a disk, in line with QEMU's."""
        self.monitor.publish(Event(event, {"name": attachment.name, **data}))

    # What there is in QEMU.

    async def has_device(self, device_id: str) -> bool:
        """Whether QEMU has a device of that id."""
        found: list[dict[str, Any]] = await self.monitor.execute("qom-list", {"path": "/machine/peripheral"})
        return any(entry["name"] == device_id for entry in found)

    async def virtual_size(self, node: str) -> int:
        """The bytes of a node's content. Raises KeyError if there is no such node."""
        found: list[dict[str, Any]] = await self.monitor.execute("query-named-block-nodes", {"flat": True})
        sizes = {each.get("node-name"): int(each["image"]["virtual-size"]) for each in found}
        return sizes[node]

    async def remove(self, *parts: Part) -> None:
        """Remove them, from the first to the last; what is not there is fine. Raises what `remove_parts` raises."""
        await remove_parts(self.monitor, parts)
        self.removed(*parts)

    def removed(self, *parts: Part) -> None:
        """QEMU has let go of them, or on 7.2 will once the guest runs."""
        if not self.run_state.is_running:
            self.deferred_fdsets.update(part for part in parts if part.kind == "fdset")

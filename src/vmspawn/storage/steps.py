# SPDX-License-Identifier: LGPL-2.1-or-later
"""The steps that make a drive of a descriptor, each with what takes it back.

Attaching does them in order. A failed attach, a detach and a clean-up all undo them from the end, by the same code. A
step may have been begun only, or undone before by a process that then died, so an undo takes "not there" as done.
"""

from __future__ import annotations

from typing import Any, Protocol

from ..errors import QmpError
from ..qmp.monitor import Monitor
from ..qmp.runstate import RunState
from ..waiting import first_of
from . import buses, nodes
from .attachment import Attachment
from .ports import Layout, Pool

#: Seconds between requests to the guest to let a device go: early ones are lost in firmware (HOTPLUG.md 5), later ones
#: are harmless. The last one is repeated for ever.
RETRY_INTERVALS = (1.0, 2.0, 4.0, 8.0)


class Context:
    """What the steps work on."""

    def __init__(self, monitor: Monitor, run_state: RunState, layout: Layout) -> None:
        self.monitor = monitor
        self.run_state = run_state
        self.layout = layout
        #: Descriptor sets whose removal QEMU 7.2 puts off until the guest runs again.
        self.deferred_fdsets: set[int] = set()

    def pool(self, attachment: Attachment) -> Pool:
        """Where the attachment's place belongs."""
        return self.layout.scsi if buses.TABLE[attachment.drive.bus].pool == "scsi" else self.layout.pci

    async def has_node(self, name: str) -> bool:
        """Whether QEMU has a block node of that name."""
        found: list[dict[str, Any]] = await self.monitor.execute("query-named-block-nodes", {"flat": True})
        return any(node.get("node-name") == name for node in found)

    async def has_fdset(self, number: int) -> bool:
        """Whether QEMU has a descriptor set of that number."""
        found: list[dict[str, Any]] = await self.monitor.execute("query-fdsets")
        return any(fdset["fdset-id"] == number for fdset in found)

    async def has_device(self, device_id: str) -> bool:
        """Whether QEMU has a device of that id."""
        found: list[dict[str, Any]] = await self.monitor.execute("qom-list", {"path": "/machine/peripheral"})
        return any(entry["name"] == device_id for entry in found)

    async def remove_fdset(self, number: int) -> None:
        """Remove a descriptor set; one that is not there is fine."""
        try:
            await self.monitor.execute("remove-fd", {"fdset-id": number})
        except QmpError:
            if await self.has_fdset(number):
                raise
        if not self.run_state.running:
            self.deferred_fdsets.add(number)

    async def remove_node(self, name: str) -> None:
        """Remove a block node; one that is not there is fine."""
        try:
            await self.monitor.execute("blockdev-del", {"node-name": name})
        except QmpError:
            if await self.has_node(name):
                raise


class Step(Protocol):
    """One reversible step. Both directions may raise what `Monitor.execute` raises."""

    name: str

    async def do(self, context: Context, attachment: Attachment) -> None:
        """Do it."""

    async def undo(self, context: Context, attachment: Attachment) -> None:
        """Take it back, whether it was done, begun, or taken back already."""


class ReservePlace:
    """Keep a port, slot or target for the device."""

    name = "place"

    async def do(self, context: Context, attachment: Attachment) -> None:
        context.pool(attachment).claim(attachment.place)

    async def undo(self, context: Context, attachment: Attachment) -> None:
        context.pool(attachment).release(attachment.place)


class PassDescriptor:
    """Hand the open file to QEMU as a descriptor set, so that QEMU opens no path of the user's."""

    name = "fdset"

    async def do(self, context: Context, attachment: Attachment) -> None:
        arguments = {"fdset-id": attachment.identifiers.fdset, "opaque": f"vmspawn {attachment.identifiers.device}"}
        await context.monitor.execute("add-fd", arguments, fds=(attachment.backing.fd,))
        attachment.close_backing()

    async def undo(self, context: Context, attachment: Attachment) -> None:
        attachment.close_backing()
        await context.remove_fdset(attachment.identifiers.fdset)


class AddFileNode:
    """Open the descriptor set as a block node."""

    name = "file"

    async def do(self, context: Context, attachment: Attachment) -> None:
        options = nodes.file_node(attachment.identifiers, attachment.backing)
        await context.monitor.execute("blockdev-add", options)

    async def undo(self, context: Context, attachment: Attachment) -> None:
        await context.remove_node(attachment.identifiers.file_node)


class AddFormatNode:
    """Put the image format on top."""

    name = "format"

    async def do(self, context: Context, attachment: Attachment) -> None:
        options = nodes.format_node(attachment.identifiers, attachment.backing, attachment.format)
        await context.monitor.execute("blockdev-add", options)

    async def undo(self, context: Context, attachment: Attachment) -> None:
        await context.remove_node(attachment.identifiers.format_node)


class AddDevice:
    """Plug the device in; taking it back needs the guest, and may take for ever."""

    name = "device"

    async def do(self, context: Context, attachment: Attachment) -> None:
        properties = buses.device(
            attachment.drive.bus,
            device_id=attachment.identifiers.device,
            node=attachment.identifiers.format_node,
            place=attachment.place,
            serial=attachment.serial,
        )
        await context.monitor.execute("device_add", properties)

    async def undo(self, context: Context, attachment: Attachment) -> None:
        device_id = attachment.identifiers.device
        while not attachment.gone.is_set():
            # A request before the guest has ever run would be stuck until a reset (HOTPLUG.md, "The five", 4).
            await first_of(context.run_state.has_run, attachment.gone)
            if not await self._ask(context, attachment):
                return
            interval = RETRY_INTERVALS[min(attachment.requests, len(RETRY_INTERVALS)) - 1]
            await attachment.wait_for_news(interval)
            if not attachment.gone.is_set() and not await context.has_device(device_id):
                return

    async def _ask(self, context: Context, attachment: Attachment) -> bool:
        """Ask the guest to let go; False if there is no such device. That it was asked already is no failure."""
        attachment.requests += 1
        try:
            await context.monitor.execute("device_del", {"id": attachment.identifiers.device})
        except QmpError as error:
            if error.error_class == "DeviceNotFound":
                return False
            attachment.answer = error.description
        return True


class ReleaseDescriptor:
    """Drop the descriptor set: the node holds a duplicate, and goes on with that."""

    name = "release"

    async def do(self, context: Context, attachment: Attachment) -> None:
        await context.remove_fdset(attachment.identifiers.fdset)

    async def undo(self, context: Context, attachment: Attachment) -> None:
        """Nothing: the file cannot be given back, and whoever undoes the rest does not need it."""


STEPS: tuple[Step, ...] = (
    ReservePlace(),
    PassDescriptor(),
    AddFileNode(),
    AddFormatNode(),
    AddDevice(),
    ReleaseDescriptor(),
)
STEP_BY_NAME = {step.name: step for step in STEPS}

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The steps that make a drive, each with what takes it back.

Attaching does them in order. A failed attach, a detach and a clean-up all undo them from the end, by the same code. A
step may have been begun only, or undone before by a process that then died, so an undo takes "not there" as done.
"""

from __future__ import annotations

from typing import Protocol

from .. import log
from ..errors import QmpError
from ..waiting import first_of
from . import buses, chain, nodes
from .attachment import Attachment
from .context import Context

#: Seconds between requests to the guest to let a device go: early ones are lost in firmware (HOTPLUG.md 5), later ones
#: are harmless. The last one is repeated for ever.
RETRY_INTERVALS = (1.0, 2.0, 4.0, 8.0)


class Step(Protocol):
    """One reversible step. Both directions may raise what `Monitor.execute` raises."""

    name: str

    def applies(self, attachment: Attachment) -> bool:
        """Whether the drive needs it."""

    async def do(self, context: Context, attachment: Attachment) -> None:
        """Do it."""

    async def undo(self, context: Context, attachment: Attachment) -> None:
        """Take it back, whether it was done, begun, or taken back already."""


class ReservePlace:
    """Keep a port, slot, target or namespace for the device."""

    name = "place"

    def applies(self, attachment: Attachment) -> bool:
        return True

    async def do(self, context: Context, attachment: Attachment) -> None:
        context.pool(attachment).claim(attachment.place)

    async def undo(self, context: Context, attachment: Attachment) -> None:
        context.pool(attachment).release(attachment.place)


class AddThread:
    """Make the I/O thread of a virtio-blk disk."""

    name = "thread"

    def applies(self, attachment: Attachment) -> bool:
        return attachment.drive.thread and attachment.drive.bus == "virtio-blk"

    async def do(self, context: Context, attachment: Attachment) -> None:
        await context.monitor.execute("object-add", {"qom-type": "iothread", "id": attachment.identifiers.thread})

    async def undo(self, context: Context, attachment: Attachment) -> None:
        await context.remove_object(attachment.identifiers.thread)


class AddLimits:
    """Make the group that the drive's limits belong to, be there any or not."""

    name = "limits"

    def applies(self, attachment: Attachment) -> bool:
        return True

    async def do(self, context: Context, attachment: Attachment) -> None:
        arguments = {
            "qom-type": "throttle-group",
            "id": attachment.identifiers.limits,
            **({"limits": attachment.limits.to_qemu()} if attachment.limits.any else {}),
        }
        await context.monitor.execute("object-add", arguments)

    async def undo(self, context: Context, attachment: Attachment) -> None:
        await context.remove_object(attachment.identifiers.limits)


class BuildImage:
    """Open the image in QEMU."""

    name = "image"

    def applies(self, attachment: Attachment) -> bool:
        return bool(attachment.images)

    async def do(self, context: Context, attachment: Attachment) -> None:
        await chain.build(context, attachment, attachment.images[0])

    async def undo(self, context: Context, attachment: Attachment) -> None:
        for image in reversed(attachment.images):
            await chain.dismantle(context, attachment, image)


class AddPivot:
    """Put the node on the image that the device stands on."""

    name = "pivot"

    def applies(self, attachment: Attachment) -> bool:
        return True

    async def do(self, context: Context, attachment: Attachment) -> None:
        identifiers, drive = attachment.identifiers, attachment.drive
        if attachment.images:
            options = nodes.pivot_node(identifiers, attachment.images[0], drive, read_only=attachment.read_only)
        else:
            options = nodes.blank_node(identifiers)
        await context.monitor.execute("blockdev-add", options)

    async def undo(self, context: Context, attachment: Attachment) -> None:
        await context.remove_node(attachment.identifiers.pivot)


class AddDevice:
    """Plug the device in; taking it back needs the guest, and may take for ever."""

    name = "device"

    def applies(self, attachment: Attachment) -> bool:
        return True

    async def do(self, context: Context, attachment: Attachment) -> None:
        properties = buses.device(
            attachment.drive,
            device_id=attachment.identifiers.device,
            node=attachment.identifiers.pivot,
            place=attachment.place,
            serial=attachment.serial,
            thread=attachment.identifiers.thread if attachment.drive.thread else None,
        )
        await context.monitor.execute("device_add", properties)

    async def undo(self, context: Context, attachment: Attachment) -> None:
        device_id = attachment.identifiers.device
        removal = attachment.removal
        assert removal is not None
        while not attachment.gone.is_set():
            # A request before the guest has ever run would be stuck until a reset (HOTPLUG.md, "The five", 4).
            await first_of(context.run_state.has_run, attachment.gone)
            removal.requests += 1
            try:
                await context.monitor.execute("device_del", {"id": device_id})
            except QmpError as error:
                if error.error_class == "DeviceNotFound":
                    return
                # That it was asked already, or that the guest is busy, is a state and no failure.
                removal.answer = error.description
            context.removal_requested(attachment)
            await attachment.wait_for_news(RETRY_INTERVALS[min(removal.requests, len(RETRY_INTERVALS)) - 1])
            if not attachment.gone.is_set() and not await context.has_device(device_id):
                return


STEPS: tuple[Step, ...] = (
    ReservePlace(),
    AddThread(),
    AddLimits(),
    BuildImage(),
    AddPivot(),
    AddDevice(),
)
STEP_BY_NAME = {step.name: step for step in STEPS}
_ORDER = {step.name: position for position, step in enumerate(STEPS)}


def plan(attachment: Attachment) -> list[str]:
    """Choose the steps of a drive that is to be attached, and of its image; returns the names of its own."""
    for image in attachment.images:
        image.planned = chain.plan(image)
    attachment.planned = [step.name for step in STEPS if step.applies(attachment)]
    return attachment.planned


def enter_step(context: Context, attachment: Attachment, name: str) -> None:
    """Enter a step in the journal, where it belongs in the order of undoing, ahead of doing it."""
    if name not in attachment.done:
        attachment.done.append(name)
        attachment.done.sort(key=_ORDER.__getitem__)
    context.journal_begun(attachment)


async def do_step(context: Context, attachment: Attachment, name: str) -> None:
    """Do a step."""
    enter_step(context, attachment, name)
    log.debug(f"{attachment.name}: does {name}")
    await STEP_BY_NAME[name].do(context, attachment)


async def undo_step(context: Context, attachment: Attachment, name: str) -> None:
    """Undo a step, if it was done, and strike it from the journal."""
    if name in attachment.done:
        log.debug(f"{attachment.name}: undoes {name}")
        await STEP_BY_NAME[name].undo(context, attachment)
        attachment.done.remove(name)
        context.journal_undone(attachment)

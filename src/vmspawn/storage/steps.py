# SPDX-License-Identifier: LGPL-2.1-or-later
"""The steps that make a disk, each with what takes it back.

Attaching does them in order: the journal names all of them, then QEMU gets their commands in one go. A failed attach, a
detach and a clean-up all undo them by the same code: the device first, for which the guest is asked, and then the rest
from the end. A step may have been begun only, or undone before by a process that then died, so an undo takes "not
there" as done.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .. import log
from ..aio.waiting import first_of
from ..errors import QmpError, SystemFailure
from ..qmp.monitor import Command
from . import buses, image_nodes, nodes
from .attached_disk import AttachedDisk
from .context import Context
from .qemu_objects import Part

#: Seconds between requests to the guest to let a device go: early ones are lost in firmware
#: (docs/qemu.md, "Unplug"), later ones
#: are harmless. The last one is repeated for ever.
RETRY_INTERVALS = (1.0, 2.0, 4.0, 8.0)


class Step:
    """One reversible step."""

    name: str

    def applies(self, attachment: AttachedDisk) -> bool:
        """Whether the disk needs it."""
        return True

    def begin(self, context: Context, attachment: AttachedDisk) -> Sequence[Command]:
        """Do what is ours of it; returns the commands that do the rest."""
        raise NotImplementedError

    def parts(self, attachment: AttachedDisk) -> Sequence[Part]:
        """What QEMU has of it then and lets go when told to, from the top down."""
        raise NotImplementedError

    def end(self, context: Context, attachment: AttachedDisk) -> None:
        """Take back what is ours of it, once QEMU has nothing of it any more."""


class ReservePlace(Step):
    """Keep a port, slot, target or namespace for the device."""

    name = "place"

    def begin(self, context: Context, attachment: AttachedDisk) -> Sequence[Command]:
        context.pool(attachment).claim(attachment.place)
        return ()

    def parts(self, attachment: AttachedDisk) -> Sequence[Part]:
        return ()

    def end(self, context: Context, attachment: AttachedDisk) -> None:
        context.pool(attachment).release(attachment.place)


class AddThread(Step):
    """Make the I/O thread of a virtio-blk disk."""

    name = "thread"

    def applies(self, attachment: AttachedDisk) -> bool:
        return attachment.disk.thread and attachment.disk.bus == "virtio-blk"

    def begin(self, context: Context, attachment: AttachedDisk) -> Sequence[Command]:
        return (Command("object-add", {"qom-type": "iothread", "id": attachment.identifiers.thread}),)

    def parts(self, attachment: AttachedDisk) -> Sequence[Part]:
        return (Part("object", attachment.identifiers.thread),)


class AddLimits(Step):
    """Make the group that the disk's limits belong to, be there any or not."""

    name = "limits"

    def begin(self, context: Context, attachment: AttachedDisk) -> Sequence[Command]:
        arguments = {
            "qom-type": "throttle-group",
            "id": attachment.identifiers.limits,
            **({"limits": attachment.limits.to_qemu()} if attachment.limits.any else {}),
        }
        return (Command("object-add", arguments),)

    def parts(self, attachment: AttachedDisk) -> Sequence[Part]:
        return (Part("object", attachment.identifiers.limits),)


class BuildImage(Step):
    """Open the image in QEMU."""

    name = "image"

    def applies(self, attachment: AttachedDisk) -> bool:
        return bool(attachment.images)

    def begin(self, context: Context, attachment: AttachedDisk) -> Sequence[Command]:
        return image_nodes.commands(attachment.disk, attachment.images[0])

    def parts(self, attachment: AttachedDisk) -> Sequence[Part]:
        return [part for image in attachment.images for part in image_nodes.parts(image)]

    def end(self, context: Context, attachment: AttachedDisk) -> None:
        attachment.close_backings()
        attachment.images.clear()


class AddPivot(Step):
    """Put the node on the image that the device stands on."""

    name = "pivot"

    def begin(self, context: Context, attachment: AttachedDisk) -> Sequence[Command]:
        identifiers, disk = attachment.identifiers, attachment.disk
        if attachment.images:
            options = nodes.pivot_node(identifiers, attachment.images[0], disk, read_only=attachment.read_only)
        else:
            options = nodes.blank_node(identifiers)
        return (Command("blockdev-add", options),)

    def parts(self, attachment: AttachedDisk) -> Sequence[Part]:
        return (Part("node", attachment.identifiers.pivot),)


class AddDevice(Step):
    """Plug the device in. Taking it back needs the guest, and may take for ever; that is `unplug`."""

    name = "device"

    def begin(self, context: Context, attachment: AttachedDisk) -> Sequence[Command]:
        properties = buses.device(
            attachment.disk,
            device_id=attachment.identifiers.device,
            node=attachment.identifiers.pivot,
            place=attachment.place,
            serial=attachment.serial,
            thread=attachment.identifiers.thread if attachment.disk.thread else None,
        )
        return (Command("device_add", properties),)

    def parts(self, attachment: AttachedDisk) -> Sequence[Part]:
        return ()


# None stands on those after it, and the device stands on all: where one fails, it fails too. The image comes first, for
# the command with a descriptor begins a message: so all of them are one.
STEPS: tuple[Step, ...] = (
    ReservePlace(),
    BuildImage(),
    AddThread(),
    AddLimits(),
    AddPivot(),
    AddDevice(),
)
STEP_BY_NAME = {step.name: step for step in STEPS}
_ORDER = {step.name: position for position, step in enumerate(STEPS)}


def plan(attachment: AttachedDisk) -> list[str]:
    """The names of the steps that a disk needs."""
    return [step.name for step in STEPS if step.applies(attachment)]


def enter_step(context: Context, attachment: AttachedDisk, name: str) -> None:
    """Enter a step in the journal, where it belongs in the order of undoing, ahead of doing it."""
    if name not in attachment.done:
        attachment.done.append(name)
        attachment.done.sort(key=_ORDER.__getitem__)
    context.journal_begun(attachment)


async def do_step(context: Context, attachment: AttachedDisk, name: str) -> None:
    """Do a step of a disk that is there. Raises what `Monitor.execute` raises."""
    enter_step(context, attachment, name)
    for result in await context.monitor.execute_all(STEP_BY_NAME[name].begin(context, attachment)):
        if isinstance(result, QmpError):
            raise result


async def do_all(context: Context, attachment: AttachedDisk) -> None:
    """Do all the steps of a disk that comes. Raises what `Monitor.execute` raises; then some may have been done."""
    attachment.done = plan(attachment)
    commands = [command for name in attachment.done for command in STEP_BY_NAME[name].begin(context, attachment)]
    try:
        context.journal(attachment)
        for name in attachment.done:
            log.debug(f"{attachment.name}: does {name}")
        for result in await context.monitor.execute_all(commands, behind=image_nodes.drops(attachment.images)):
            if isinstance(result, QmpError):
                raise result
    except (QmpError, SystemFailure):
        # The device is the last of the steps, and not there if any has failed.
        attachment.done.remove(AddDevice.name)
        raise
    for image in attachment.images:
        image_nodes.made(context, image)


async def undo_steps(context: Context, attachment: AttachedDisk, names: Iterable[str]) -> None:
    """Undo those of the steps that were done, none of them the device, and strike them from the journal.

    Raises what `remove_parts` raises; all of them can be undone again then.
    """
    steps = [STEP_BY_NAME[name] for name in reversed(attachment.done) if name in names]
    if not steps:
        return
    for step in steps:
        log.debug(f"{attachment.name}: undoes {step.name}")
    await context.remove(*(part for step in steps for part in step.parts(attachment)))
    for step in steps:
        step.end(context, attachment)
        attachment.done.remove(step.name)
    context.journal_undone(attachment)


async def unplug(context: Context, attachment: AttachedDisk) -> None:
    """Take the device back: ask the guest until it is gone. Raises what `Monitor.execute` raises."""
    if AddDevice.name in attachment.done:
        log.debug(f"{attachment.name}: undoes {AddDevice.name}")
        await _ask_until_gone(context, attachment)
        attachment.done.remove(AddDevice.name)
        context.journal_undone(attachment)


async def _ask_until_gone(context: Context, attachment: AttachedDisk) -> None:
    device_id = attachment.identifiers.device
    removal = attachment.removal
    assert removal is not None
    while not attachment.gone.is_set():
        # A request before the guest has ever run would be stuck until a reset (docs/qemu.md, "Unplug").
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

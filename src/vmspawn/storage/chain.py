# SPDX-License-Identifier: LGPL-2.1-or-later
"""The steps that make an image ready to be put under a drive's pivot, each with what takes it back.

They are done in order and undone from the end. A step may have been begun only, or undone before by a process that then
died, so an undo takes "not there" as done.
"""

from __future__ import annotations

from typing import Protocol

from . import nodes
from .attachment import Attachment
from .context import Context
from .image import Image


class ImageStep(Protocol):
    """One reversible step of an image. Both directions may raise what `Monitor.execute` raises."""

    name: str

    def applies(self, image: Image) -> bool:
        """Whether the image needs it."""

    async def do(self, context: Context, attachment: Attachment, image: Image) -> None:
        """Do it."""

    async def undo(self, context: Context, image: Image) -> None:
        """Take it back, whether it was done, begun, or taken back already."""


class PassDescriptor:
    """Hand the open file to QEMU as a descriptor set, so that QEMU opens no path of the user's."""

    name = "fdset"

    def applies(self, image: Image) -> bool:
        return image.backing is not None

    async def do(self, context: Context, attachment: Attachment, image: Image) -> None:
        assert image.backing is not None
        arguments = {"fdset-id": image.fdset, "opaque": f"vmspawn {attachment.identifiers.device}"}
        await context.monitor.execute("add-fd", arguments, fds=(image.backing.fd,))
        image.close_backing()

    async def undo(self, context: Context, image: Image) -> None:
        image.close_backing()
        await context.remove_fdset(image.fdset)


class AddFileNode:
    """Open the descriptor set as a block node."""

    name = "file"

    def applies(self, image: Image) -> bool:
        return True

    async def do(self, context: Context, attachment: Attachment, image: Image) -> None:
        await context.monitor.execute("blockdev-add", nodes.file_node(image, attachment.drive))

    async def undo(self, context: Context, image: Image) -> None:
        await context.remove_node(image.file_node)


class AddFormatNode:
    """Put the image format on top."""

    name = "format"

    def applies(self, image: Image) -> bool:
        return image.format != "raw"

    async def do(self, context: Context, attachment: Attachment, image: Image) -> None:
        await context.monitor.execute("blockdev-add", nodes.format_node(image, attachment.drive))

    async def undo(self, context: Context, image: Image) -> None:
        await context.remove_node(image.format_node)


IMAGE_STEPS: tuple[ImageStep, ...] = (PassDescriptor(), AddFileNode(), AddFormatNode())
_BY_NAME = {step.name: step for step in IMAGE_STEPS}


async def build(context: Context, attachment: Attachment, image: Image) -> None:
    """Do the steps that the image needs and that were not done."""
    for step in IMAGE_STEPS:
        if step.applies(image) and step.name not in image.done:
            image.done.append(step.name)
            context.journal_begun(attachment)
            await step.do(context, attachment, image)


async def release(context: Context, image: Image) -> None:
    """Drop the descriptor set: the file's node holds a duplicate, and goes on with that."""
    if PassDescriptor.name in image.done:
        await _BY_NAME[PassDescriptor.name].undo(context, image)
        image.done.remove(PassDescriptor.name)


async def dismantle(context: Context, attachment: Attachment, image: Image) -> None:
    """Undo what was done, and forget the image. May be called again where it failed."""
    while image.done:
        await _BY_NAME[image.done[-1]].undo(context, image)
        image.done.pop()
        context.journal_undone(attachment)
    image.close_backing()
    if image in attachment.images:
        attachment.images.remove(image)
    context.journal_undone(attachment)


def plan(image: Image) -> list[str]:
    """The names of the steps that the image will be made by."""
    return [step.name for step in IMAGE_STEPS if step.applies(image)]

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Media of optical drives: in, out, and a tray that the guest may have locked (HOTPLUG.md 4)."""

from __future__ import annotations

import asyncio
from typing import Any

from ..errors import BadConfig, QmpError, StoragePending
from . import chain
from .attachment import Attachment
from .context import Context
from .image import Image
from .steps import AddPivot, BuildImage, do_step, enter_step, undo_step

#: Seconds that the guest has to open a tray that it has locked.
TRAY_TIMEOUT = 10.0


def check_optical(attachment: Attachment) -> None:
    """Raise BadConfig if the drive has no media."""
    if attachment.drive.bus != "scsi-cd":
        raise BadConfig(f"{attachment.name} is a {attachment.drive.bus} disk and has no media", hint="use replace-disk")


async def empty(context: Context, attachment: Attachment) -> None:
    """Take out what a drive that is to be empty was plugged in with; the tray ends closed.

    QEMU would plug in an empty one too, but then it forgets to let go of the media that come and go later.
    """
    await _open_tray(context, attachment, force=True)
    await _take_out(context, attachment, None)
    await context.monitor.execute("blockdev-close-tray", {"id": attachment.identifiers.device})


async def insert(context: Context, attachment: Attachment, image: Image, *, force: bool) -> None:
    """Put a medium in, in the place of one that is there. The descriptor of `image` is closed in any case.

    Raises StoragePending if the guest holds the tray locked, QmpError if QEMU cannot use the image; the old medium
    stays then.
    """
    old = attachment.image
    attachment.images.append(image)
    try:
        # QEMU opens the image before the tray is touched.
        enter_step(context, attachment, BuildImage.name)
        await chain.build(context, attachment, image)
        await _open_tray(context, attachment, force=force)
        await _take_out(context, attachment, old)
        await chain.release(context, image)
        await do_step(context, attachment, AddPivot.name)
        arguments = {"id": attachment.identifiers.device, "node-name": attachment.identifiers.pivot}
        await context.monitor.execute("blockdev-insert-medium", arguments)
        await context.monitor.execute("blockdev-close-tray", {"id": attachment.identifiers.device})
    except (QmpError, StoragePending):
        if attachment.image is image:
            await _take_out(context, attachment, image)
        else:
            await chain.dismantle(context, attachment, image)
        raise


async def eject(context: Context, attachment: Attachment, *, force: bool) -> None:
    """Take the medium out; the tray stays open. Raises StoragePending if the guest holds the tray locked."""
    await _open_tray(context, attachment, force=force)
    await _take_out(context, attachment, attachment.image)


async def _open_tray(context: Context, attachment: Attachment, *, force: bool) -> None:
    """Open the tray, or ask the guest to; forced, it opens whatever the guest does."""
    device = attachment.identifiers.device
    arguments = {"id": device, "force": force}
    with context.monitor.events() as events:
        try:
            await context.monitor.execute("blockdev-open-tray", arguments)
        except QmpError as error:
            if "is locked" not in error.description:
                raise
        else:
            return
        try:
            async with asyncio.timeout(TRAY_TIMEOUT):
                async for event in events:
                    data: dict[str, Any] = event.data or {}
                    if event.name == "DEVICE_TRAY_MOVED" and data.get("id") == device and data.get("tray-open"):
                        return
        except TimeoutError:
            raise StoragePending(
                f"the guest holds the tray of {attachment.name} locked and has not opened it within {TRAY_TIMEOUT:g} s",
                hint="unmount it in the guest, or use --force",
            ) from None


async def _take_out(context: Context, attachment: Attachment, medium: Image | None) -> None:
    """Remove the medium from the open tray, if there is one, and close its image."""
    if AddPivot.name in attachment.done:
        await context.monitor.execute("blockdev-remove-medium", {"id": attachment.identifiers.device})
        await undo_step(context, attachment, AddPivot.name)
    if medium is not None:
        await chain.dismantle(context, attachment, medium)
    if not attachment.images:
        await undo_step(context, attachment, BuildImage.name)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Inserts and ejects media of optical drives, whose tray the guest may have locked (docs/qemu.md, "Media")."""

from __future__ import annotations

import asyncio
import contextlib
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..errors import BadConfig, QmpError, StoragePending
from ..timeouts import TRAY_TIMEOUT
from . import images
from .attached_disk import AttachedDisk
from .context import Context
from .image import Image
from .steps import IMAGE, PIVOT

if TYPE_CHECKING:
    from ..qmp.events import EventStream

#: Seconds between two requests that the guest open the tray.
_ASK_AGAIN = 1.0

#: The number of attempts to open a tray that the guest closes before the medium has moved.
_ATTEMPTS = 10


def check_optical(attachment: AttachedDisk) -> None:
    """Raise BadConfig if the disk is not an optical drive."""
    if attachment.disk.bus != "scsi-cd":
        raise BadConfig(f"{attachment.name} is a {attachment.disk.bus} disk and has no media", hint="use replace-disk")


class Tray:
    """The tray of one optical drive. The guest may lock it, and may close it at any moment."""

    def __init__(
        self, context: Context, attachment: AttachedDisk, *, force: bool, timeout: float = TRAY_TIMEOUT
    ) -> None:
        """Prepare a change. `force` opens a locked tray; without it, the guest has `timeout` seconds to open it."""
        self._monitor = context.monitor
        self._device = attachment.identifiers.device
        self._name = attachment.name
        self._force = force
        self._timeout = timeout

    async def open(self) -> None:
        """Open the tray, or request that the guest open it. Raises StoragePending if the guest does not.

        A successful blockdev-open-tray proves nothing: QEMU also returns success when it has only passed the request
        on. A reset of the machine, or of the controller, closes and unlocks the tray without an event; so the request
        is repeated.
        """
        deadline = monotonic() + self._timeout
        with self._monitor.events() as events:
            while not await self._ask():
                left = deadline - monotonic()
                if left <= 0:
                    raise self._pending()
                if await self._moved(events, min(left, _ASK_AGAIN)):
                    return

    async def _ask(self) -> bool:
        """Request that the tray open; returns whether it is open. A tray that the guest has locked stays closed."""
        for _ in range(_ATTEMPTS):
            await self._monitor.execute("blockdev-open-tray", {"id": self._device, "force": self._force})
            tray = await self._query()
            if tray.get("tray_open"):
                return True
            if tray.get("locked", True):
                break
        return False

    def _pending(self) -> StoragePending:
        return StoragePending.with_fields(
            "the guest has locked the tray of {disk} and has not opened it within {seconds} s",
            hint="unmount the medium in the guest, or use {force=True}",
            disk=self._name,
            seconds=f"{self._timeout:g}",
        )

    async def _query(self) -> dict[str, Any]:
        """Return QEMU's description of the drive, empty if QEMU has none."""
        for found in await self._monitor.execute("query-block"):
            if self._device in found.get("qdev", "").split("/"):
                return dict(found)
        return {}

    async def _moved(self, events: EventStream, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the tray to open; returns whether it did."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                async for event in events:
                    if event.name == "DEVICE_TRAY_MOVED" and self._was_opened(event.data or {}):
                        return True
        return False

    def _was_opened(self, data: dict[str, Any]) -> bool:
        return data.get("id") == self._device and bool(data.get("tray-open"))

    async def run(self, command: str, **arguments: object) -> None:
        """Run a command that needs an open tray. Opens the tray first, and again if the guest closes it meanwhile."""
        for attempt in range(_ATTEMPTS):
            await self.open()
            try:
                await self._monitor.execute(command, {"id": self._device, **arguments})
            except QmpError:
                if attempt == _ATTEMPTS - 1 or (await self._query()).get("tray_open"):
                    raise
            else:
                return

    async def close(self) -> None:
        """Close the tray."""
        await self._monitor.execute("blockdev-close-tray", {"id": self._device})


async def empty(context: Context, attachment: AttachedDisk) -> None:
    """Remove the blank medium with which an empty drive was plugged in, and close the tray.

    If QEMU plugs in a drive without a medium, it never releases the media that are inserted later.
    """
    tray = Tray(context, attachment, force=True)
    await _take_out(context, attachment, tray, None)
    await tray.close()


async def insert(context: Context, attachment: AttachedDisk, image: Image, *, force: bool, timeout: float) -> None:
    """Insert a medium, which replaces the present one. The descriptor of `image` is closed in any case.

    Raises StoragePending if the guest keeps the tray locked, QmpError if QEMU cannot use the image; the old medium
    stays then.
    """
    old = attachment.image
    tray = Tray(context, attachment, force=force, timeout=timeout)
    attachment.images.append(image)
    try:
        # QEMU opens the image before the tray is touched.
        context.hotplug.enter_step(attachment, IMAGE)
        await images.build(context.hotplug, attachment, image)
        await tray.open()
        await _take_out(context, attachment, tray, old)
        await context.hotplug.do_step(attachment, PIVOT)
        await tray.run("blockdev-insert-medium", **{"node-name": attachment.identifiers.pivot})
        await tray.close()
    except (QmpError, StoragePending):
        if attachment.image is image:
            await context.hotplug.undo_steps(attachment, [PIVOT])
        await images.dismantle(context.hotplug, attachment, image)
        if not attachment.images:
            await context.hotplug.undo_steps(attachment, [IMAGE])
        raise


async def eject(context: Context, attachment: AttachedDisk, *, force: bool, timeout: float) -> None:
    """Remove the medium; the tray stays open. Raises StoragePending if the guest keeps the tray locked."""
    tray = Tray(context, attachment, force=force, timeout=timeout)
    await tray.open()
    await _take_out(context, attachment, tray, attachment.image)


async def _take_out(context: Context, attachment: AttachedDisk, tray: Tray, medium: Image | None) -> None:
    """Remove the medium, if the drive has one, and close its image."""
    if PIVOT in attachment.done:
        await tray.run("blockdev-remove-medium")
        await context.hotplug.undo_steps(attachment, [PIVOT])
    if medium is not None:
        await images.dismantle(context.hotplug, attachment, medium)
    if not attachment.images:
        await context.hotplug.undo_steps(attachment, [IMAGE])


async def forget(context: Context, attachment: AttachedDisk) -> None:
    """Close the image of a medium that a manager ejected before it died."""
    await context.hotplug.undo_steps(attachment, [IMAGE, PIVOT])

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Changes attached disks while the guest uses them: image, size, medium and limits."""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from ..errors import ConfigNotSupported, StorageImmutable, StoragePending, SystemFailure, VmspawnError
from ..hotplug.attachment import State
from ..timeouts import TRAY_TIMEOUT
from . import admission, displaced, images, inactive_images, media, swap
from .attached_disk import AttachedDisk
from .backing import Backing
from .context import Context
from .explain import STORAGE_HINT, explain
from .image import Image
from .limits import Limits, check_limits
from .resize import resize_disk

#: Seconds after which a change of a disk, or a forced detach, raises Timeout. The change itself continues.
CHANGE_TIMEOUT = 40.0

#: The name of vmspawn's event in the streams of QEMU's events.
CHANGED_EVENT = "StorageChanged"

_T = TypeVar("_T")


class Changes:
    """The changes of a machine's attached disks."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def replace(
        self, name: str, backing: Backing, *, format: str | None = None, path: str = "", shrink: bool = False
    ) -> int:
        """Replace a disk's image while the guest uses the disk; returns the new size in bytes.

        Takes ownership of `backing`. Raises NoSuchStorage, StorageImmutable, ConfigNotSupported for an optical
        disk, SystemFailure with EROFS for a read-only image of a writable disk, and what `Storage.attach` raises. The
        disk keeps its image if this fails.
        """
        try:
            attachment = self._context.find(name)
            check_not_boot(attachment, "replaced")
            if attachment.disk.bus == "scsi-cd":
                raise ConfigNotSupported(f"{name} is an optical drive", hint="insert another medium")
            _check_writable(attachment, backing)
            image = await self._make_image(attachment, backing, format, path, path or "the new image")
        except BaseException:
            backing.close()
            raise

        async def work() -> int:
            return await swap.replace(self._context, attachment, image, shrink=shrink)

        return await self._change(attachment, work, "replacing", image, needs_active=True)

    async def resize(self, name: str, size: int | None = None, *, shrink: bool = False) -> int:
        """Resize a disk and its image while the guest uses the disk; returns the new size in bytes.

        With `size` None, the disk gets the present size of the image. Raises NoSuchStorage, BadConfig,
        ConfigNotSupported or QmpError.
        """
        attachment = self._context.find(name)

        async def work() -> int:
            return await resize_disk(self._context, attachment, size, shrink=shrink)

        return await self._change(attachment, work, "resizing", needs_active=True)

    async def limit(self, name: str, limits: Limits) -> None:
        """Change a disk's I/O limits; the default Limits remove them. Raises NoSuchStorage, BadConfig or QmpError."""
        attachment = self._context.find(name)
        check_limits(limits)

        async def work() -> None:
            await swap.limit(self._context, attachment, limits)

        await self._change(attachment, work, "limiting")

    async def insert_media(
        self,
        name: str,
        backing: Backing,
        *,
        format: str | None = None,
        path: str = "",
        force: bool = False,
        timeout: float = TRAY_TIMEOUT,
    ) -> None:
        """Insert a medium into an optical drive; replaces the present medium. Takes ownership of `backing`.

        Raises NoSuchStorage, BadConfig, QmpError, or StoragePending if the guest keeps the tray locked for `timeout`
        seconds.
        """
        try:
            attachment = self._context.find(name)
            media.check_optical(attachment)
            image = await self._make_image(attachment, backing, format, path, path or "the medium")
        except BaseException:
            backing.close()
            raise

        async def work() -> None:
            await media.insert(self._context, attachment, image, force=force, timeout=timeout)

        await self._change(attachment, work, "changing the medium of", image)

    async def eject_media(self, name: str, *, force: bool = False, timeout: float = TRAY_TIMEOUT) -> None:
        """Remove the medium from an optical drive; the tray stays open. Raises what `insert_media` raises."""
        attachment = self._context.find(name)
        media.check_optical(attachment)

        async def work() -> None:
            await media.eject(self._context, attachment, force=force, timeout=timeout)

        await self._change(attachment, work, "ejecting the medium of")

    async def _make_image(
        self, attachment: AttachedDisk, backing: Backing, format: str | None, path: str, what: str
    ) -> Image:
        """Make a new image for a disk. On failure, the caller keeps `backing`. Messages call the image `what`."""
        image_format = await images.choose_format(backing, format, what=what)
        admission.check_not_attached(self._context.register, backing, share=attachment.disk.share)
        disk = attachment.disk._replace(path=path)
        return admission.make_image(self._context.register.fresh_number(), disk, backing, image_format, what)

    async def _change(
        self,
        attachment: AttachedDisk,
        work: Callable[[], Coroutine[Any, Any, _T]],
        doing: str,
        image: Image | None = None,
        *,
        needs_active: bool = False,
    ) -> _T:
        """Run a change of an attached disk exclusively, and to its end even if the caller is cancelled.

        `image` is the disk's new image, if any; its descriptor is closed if the change does not begin.
        `needs_active` is true for a change that QEMU cannot make to inactive images.
        """

        async def alone() -> _T:
            async with self._context.hotplug.gate.together(), attachment.lock:
                if attachment.state is not State.ATTACHED:
                    if image is not None:
                        image.close_backing()
                    raise StoragePending(f"{attachment.name} is {attachment.state}", hint="try again later")
                try:
                    if needs_active:
                        await inactive_images.check(self._context)
                    await displaced.check(self._context, attachment)
                except VmspawnError:
                    if image is not None:
                        image.close_backing()
                    raise
                result = await work()
            self._context.hotplug.publish(CHANGED_EVENT, attachment)
            return result

        try:
            return await self._context.hotplug.tasks.run(
                alone(), f"{doing} {attachment.name}", timeout=CHANGE_TIMEOUT, hint=STORAGE_HINT
            )
        except VmspawnError as error:
            machine = self._context.hotplug.journal.machine
            raise await explain(error, attachment.name, image, machine) from None


def check_not_boot(attachment: AttachedDisk, what: str) -> None:
    """Raise StorageImmutable for a boot disk. `what` is the forbidden change, for the error message."""
    if attachment.is_boot:
        raise StorageImmutable(f"{attachment.name} is a boot disk and cannot be {what} while the machine runs")


def _check_writable(attachment: AttachedDisk, backing: Backing) -> None:
    if not attachment.read_only and not backing.is_writable:
        raise SystemFailure(f"{attachment.name} is writable and the new image is not", errno.EROFS)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Changing disks that are attached, while the guest uses them: another image, size, medium, or other limits."""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from ..errors import ConfigNotSupported, StorageImmutable, StoragePending, SystemFailure, VmspawnError
from ..hotplug.attachment import State
from ..timeouts import TRAY_TIMEOUT
from . import admission, displaced, media, swap
from . import resize as resizing
from .attached_disk import AttachedDisk
from .backing import Backing
from .context import Context
from .explain import STORAGE_HINT, explain
from .image import Image
from .limits import Limits, check_limits

#: Seconds that a change of a disk, or taking its image away by force, is waited for. It goes on after that.
CHANGE_TIMEOUT = 40.0

#: An event of our own, in the streams beside QEMU's.
CHANGED_EVENT = "StorageChanged"

_T = TypeVar("_T")


class Changes:
    """What can be done to the disks of a machine without detaching them."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def replace(
        self, name: str, backing: Backing, *, format: str | None = None, path: str = "", shrink: bool = False
    ) -> int:
        """Put another image in the place of a disk's, while the guest uses it, and return the new size in bytes.

        Owns `backing` from the call on. Raises NoSuchStorage, StorageImmutable, ConfigNotSupported for an optical
        disk, SystemFailure with EROFS for a read-only image under a writable disk, and what an attach raises; the
        disk keeps its image then.
        """
        try:
            attachment = self._context.find(name)
            check_not_boot(attachment, "replaced")
            if attachment.disk.bus == "scsi-cd":
                raise ConfigNotSupported(f"{name} is an optical drive", hint="insert another medium")
            _check_writable(attachment, backing)
            admission.check_not_attached(self._context.register, backing, share=attachment.disk.share)
            disk = attachment.disk._replace(path=path)
            image = admission.make_image(
                self._context.register.fresh_number(), disk, backing, format, path or "the new image"
            )
        except BaseException:
            backing.close()
            raise

        async def work() -> int:
            return await swap.replace(self._context, attachment, image, shrink=shrink)

        return await self._change(attachment, work, "replacing", image)

    async def resize(self, name: str, size: int | None = None, *, shrink: bool = False) -> int:
        """Resize a disk and its image, while the guest uses it, and return its size in bytes.

        None tells the guest the size that the image was given from outside. Raises NoSuchStorage, BadConfig,
        ConfigNotSupported or QmpError.
        """
        attachment = self._context.find(name)

        async def work() -> int:
            return await resizing.resize(self._context, attachment, size, shrink=shrink)

        return await self._change(attachment, work, "resizing")

    async def limit(self, name: str, limits: Limits) -> None:
        """Change a disk's I/O limits; the default Limits are none. Raises NoSuchStorage, BadConfig or QmpError."""
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
        """Put a medium into an optical drive, in the place of one that is there. Owns `backing` from the call on.

        Raises NoSuchStorage, BadConfig, QmpError, or StoragePending if the guest holds the tray locked for `timeout` s.
        """
        try:
            attachment = self._context.find(name)
            media.check_optical(attachment)
            admission.check_not_attached(self._context.register, backing, share=False)
            disk = attachment.disk._replace(path=path)
            image = admission.make_image(
                self._context.register.fresh_number(), disk, backing, format, path or "the medium"
            )
        except BaseException:
            backing.close()
            raise

        async def work() -> None:
            await media.insert(self._context, attachment, image, force=force, timeout=timeout)

        await self._change(attachment, work, "changing the medium of", image)

    async def eject_media(self, name: str, *, force: bool = False, timeout: float = TRAY_TIMEOUT) -> None:
        """Take the medium out of an optical drive; the tray stays open. Raises what `insert_media` raises."""
        attachment = self._context.find(name)
        media.check_optical(attachment)

        async def work() -> None:
            await media.eject(self._context, attachment, force=force, timeout=timeout)

        await self._change(attachment, work, "ejecting the medium of")

    async def _change(
        self,
        attachment: AttachedDisk,
        work: Callable[[], Coroutine[Any, Any, _T]],
        doing: str,
        image: Image | None = None,
    ) -> _T:
        """Do something to an attached disk, alone, and to its end even if the caller goes away.

        `image` is one that comes to it; its descriptor is closed if it does not.
        """

        async def alone() -> _T:
            async with attachment.lock:
                if attachment.state is not State.ATTACHED:
                    if image is not None:
                        image.close_backing()
                    raise StoragePending(f"{attachment.name} is {attachment.state}", hint="wait until that is over")
                try:
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
            raise explain(error, attachment.name, image, machine) from None


def check_not_boot(attachment: AttachedDisk, what: str) -> None:
    """Raise StorageImmutable for a disk that QEMU was started with."""
    if attachment.boot:
        raise StorageImmutable(
            f"{attachment.name} has been there from boot and cannot be {what} while the machine runs"
        )


def _check_writable(attachment: AttachedDisk, backing: Backing) -> None:
    if not attachment.read_only and not backing.writable:
        raise SystemFailure(f"{attachment.name} is writable and the new image is not", errno.EROFS)

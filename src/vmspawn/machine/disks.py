# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a program does to a machine's disks: images are opened as the caller, by their paths, or are open already."""

from __future__ import annotations

import os
from typing import Any

from ..storage import backing as backings
from ..storage import disk as disks
from ..storage.attached_disk import AttachedDisk
from ..storage.backing import Backing
from ..storage.disk import Disk
from ..storage.hotplug import DETACH_TIMEOUT, Storage
from ..storage.limits import Limits


class Disks:
    """The part of Machine that plugs disks in and out and changes them."""

    @property
    def storage(self) -> Storage:
        """The machine's disks. Raises NotConnected if it does not run."""
        raise NotImplementedError

    async def attach(self, disk: Disk) -> AttachedDisk:
        """Open a disk's image as the caller and plug it in; returns once QEMU has plugged the device.

        A scsi-cd without a path is an empty one. Raises what `open_disk` and `Storage.attach` raise; nothing is left
        behind then.
        """
        named = disks.with_defaults(disk)
        backing = None
        if disk.path:
            read_only = disks.is_only_read(disk.bus, disk.format, read_only=disk.read_only)
            backing = backings.open_disk(disk.path, read_only=read_only)
        return await self.attach_backing(named, backing)

    async def attach_backing(self, disk: Disk, backing: Backing | None) -> AttachedDisk:
        """Plug in a disk whose image is open already. Owns `backing` from the call on."""
        return await self._storage_for(backing).attach(disk, backing)

    def _storage_for(self, backing: Backing | None) -> Storage:
        """The machine's disks; if there is no machine, the backing that was for one of them is closed."""
        try:
            return self.storage
        except BaseException:
            if backing is not None:
                backing.close()
            raise

    async def detach(self, name: str, *, timeout: float = DETACH_TIMEOUT, force: bool = False) -> bool:
        """Unplug a disk; returns once nothing of it is left. Raises what `Storage.detach` raises.

        `force` takes the image away from under the guest first; returns False then if the device is still there.
        """
        return await self.storage.detach(name, timeout=timeout, force=force)

    async def replace(self, name: str, path: str, *, format: str | None = None, shrink: bool = False) -> int:
        """Open another image as the caller and put it in the place of a disk's; returns the new size in bytes.

        Raises what `open_disk` and `Changes.replace` raise; the disk keeps its image then.
        """
        read_only = any(each.name == name and each.read_only for each in self.storage)
        backing = backings.open_disk(path, read_only=read_only)
        return await self.storage.changes.replace(name, backing, format=format, path=_absolute(path), shrink=shrink)

    async def replace_backing(self, name: str, backing: Backing, **options: Any) -> int:
        """The same with an image that is open already. Owns `backing` from the call on."""
        return await self._storage_for(backing).changes.replace(name, backing, **options)

    async def resize(self, name: str, size: int | None = None, *, shrink: bool = False) -> int:
        """Resize a disk and its image; returns its size in bytes. Raises what `Changes.resize` raises."""
        return await self.storage.changes.resize(name, size, shrink=shrink)

    async def limit(self, name: str, limits: Limits) -> None:
        """Change a disk's I/O limits. Raises what `Changes.limit` raises."""
        await self.storage.changes.limit(name, limits)

    async def insert_media(self, name: str, path: str, **options: Any) -> None:
        """Open an image as the caller and put it into an optical drive. Raises what `Changes.insert_media` raises."""
        backing = backings.open_disk(path, read_only=True)
        await self.storage.changes.insert_media(name, backing, path=_absolute(path), **options)

    async def insert_media_backing(self, name: str, backing: Backing, **options: Any) -> None:
        """The same with an image that is open already. Owns `backing` from the call on."""
        await self._storage_for(backing).changes.insert_media(name, backing, **options)

    async def eject_media(self, name: str, **options: Any) -> None:
        """Take the medium out of an optical drive. Raises what `Changes.eject_media` raises."""
        await self.storage.changes.eject_media(name, **options)


def _absolute(path: str) -> str:
    return os.path.abspath(path)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a program does to a machine's disks: images are opened as the caller, by their paths, or are open already."""

from __future__ import annotations

import os
from typing import Any

from ..storage import backing as backings
from ..storage import disk as drives
from ..storage.attached_disk import Attachment
from ..storage.backing import Backing
from ..storage.disk import Drive
from ..storage.hotplug import DETACH_TIMEOUT, Storage
from ..storage.limits import Limits


class Disks:
    """The part of Machine that plugs disks in and out and changes them."""

    @property
    def storage(self) -> Storage:
        """The machine's drives. Raises NotConnected if it does not run."""
        raise NotImplementedError

    async def attach(self, drive: Drive) -> Attachment:
        """Open a drive's image as the caller and plug it in; returns once QEMU has plugged the device.

        A scsi-cd without a path is an empty one. Raises what `open_drive` and `Storage.attach` raise; nothing is left
        behind then.
        """
        named = drives.with_defaults(drive)
        backing = None
        if drive.path:
            read_only = drives.is_only_read(drive.bus, drive.format, read_only=drive.read_only)
            backing = backings.open_drive(drive.path, read_only=read_only)
        return await self.attach_backing(named, backing)

    async def attach_backing(self, drive: Drive, backing: Backing | None) -> Attachment:
        """Plug in a drive whose image is open already. Owns `backing` from the call on."""
        return await self._storage_for(backing).attach(drive, backing)

    def _storage_for(self, backing: Backing | None) -> Storage:
        """The machine's drives; if there is no machine, the backing that was for one of them is closed."""
        try:
            return self.storage
        except BaseException:
            if backing is not None:
                backing.close()
            raise

    async def detach(self, name: str, *, timeout: float = DETACH_TIMEOUT, force: bool = False) -> bool:
        """Unplug a drive; returns once nothing of it is left. Raises what `Storage.detach` raises.

        `force` takes the image away from under the guest first; returns False then if the device is still there.
        """
        return await self.storage.detach(name, timeout=timeout, force=force)

    async def replace(self, name: str, path: str, *, format: str | None = None, shrink: bool = False) -> int:
        """Open another image as the caller and put it in the place of a drive's; returns the new size in bytes.

        Raises what `open_drive` and `Changes.replace` raise; the drive keeps its image then.
        """
        read_only = any(each.name == name and each.read_only for each in self.storage)
        backing = backings.open_drive(path, read_only=read_only)
        return await self.storage.changes.replace(name, backing, format=format, path=_absolute(path), shrink=shrink)

    async def replace_backing(self, name: str, backing: Backing, **options: Any) -> int:
        """The same with an image that is open already. Owns `backing` from the call on."""
        return await self._storage_for(backing).changes.replace(name, backing, **options)

    async def resize(self, name: str, size: int | None = None, *, shrink: bool = False) -> int:
        """Resize a drive and its image; returns its size in bytes. Raises what `Changes.resize` raises."""
        return await self.storage.changes.resize(name, size, shrink=shrink)

    async def limit(self, name: str, limits: Limits) -> None:
        """Change a drive's I/O limits. Raises what `Changes.limit` raises."""
        await self.storage.changes.limit(name, limits)

    async def insert_media(self, name: str, path: str, **options: Any) -> None:
        """Open an image as the caller and put it into an optical drive. Raises what `Changes.insert_media` raises."""
        backing = backings.open_drive(path, read_only=True)
        await self.storage.changes.insert_media(name, backing, path=_absolute(path), **options)

    async def insert_media_backing(self, name: str, backing: Backing, **options: Any) -> None:
        """The same with an image that is open already. Owns `backing` from the call on."""
        await self._storage_for(backing).changes.insert_media(name, backing, **options)

    async def eject_media(self, name: str, **options: Any) -> None:
        """Take the medium out of an optical drive. Raises what `Changes.eject_media` raises."""
        await self.storage.changes.eject_media(name, **options)


def _absolute(path: str) -> str:
    return os.path.abspath(path)

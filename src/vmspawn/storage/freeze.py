# SPDX-License-Identifier: LGPL-2.1-or-later
"""Put an overlay on the image of each writable disk, so that the image stays as it is from then on.

1. `prepare` opens the overlays beside the disks, while the guest runs, and gives QEMU a read-only descriptor of each
   image in the set that the image was opened from. 2. `switch` puts all overlays in at once, while the guest does not
   run; QEMU reopens the images with the read-only descriptors. 3. `finish` drops the descriptors, or `undo` the
   overlays. A manager that dies in between leaves both images in the journal: `recovery.py` keeps the one in use.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..errors import QmpError, SystemFailure, VmspawnError
from ..hotplug.attachment import State
from ..hotplug.qemu_objects import FDSET, QemuObject
from ..qmp.monitor import Command
from . import image_nodes, images
from .attached_disk import AttachedDisk
from .context import Context
from .image import Image

#: Seconds that QEMU may take to close and open all images.
_SWITCH_TIMEOUT = 60.0


class Frozen(NamedTuple):
    """A disk with the image that it stands on, and the overlay that goes on it."""

    disk: AttachedDisk
    base: Image
    overlay: Image


class Freeze:
    """One freeze of a machine's disks. The caller keeps all others from changing disks meanwhile."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._hotplug = context.hotplug
        self.frozen: list[Frozen] = []
        self._read_only: list[QemuObject] = []

    @property
    def candidates(self) -> list[AttachedDisk]:
        """The disks that need an overlay."""
        return [each for each in self._context.register if needs_overlay(each)]

    async def prepare(
        self,
        make: Callable[[AttachedDisk, int, int], Image],
        open_read_only: Callable[[AttachedDisk, Image], int],
    ) -> None:
        """Open the overlays. `make` makes the image of a disk's overlay, given its number and the disk's size in bytes;
        `open_read_only` opens an image for reading.

        Raises what these raise, and what `Monitor.execute` raises; `undo` must follow then.
        """
        disks = self.candidates
        sizes = await self._sizes()
        for disk in disks:
            base = disk.images[0]
            overlay = make(disk, self._context.register.fresh_number(), sizes[disk.identifiers.pivot])
            overlay.base = base
            disk.images.append(overlay)
            self.frozen.append(Frozen(disk, base, overlay))
        commands = [command for each in self.frozen for command in _commands(each)]
        spent = [part for each in self.frozen for part in image_nodes.spent(each.overlay)]
        self._context.register.save()
        await self._execute(commands)
        await self._hotplug.remove(*spent)
        for each in self.frozen:
            image_nodes.made(each.overlay)
        await self._lend(open_read_only)

    async def _sizes(self) -> dict[str, int]:
        found = await self._context.monitor.execute("query-named-block-nodes", {"flat": True})
        return {each["node-name"]: int(each["image"]["virtual-size"]) for each in found}

    async def _lend(self, open_read_only: Callable[[AttachedDisk, Image], int]) -> None:
        """Give QEMU the read-only descriptors. They are a part of the journal's images: an adoption drops them."""
        with contextlib.ExitStack() as closing:
            commands = []
            for each in self.frozen:
                fd = open_read_only(each.disk, each.base)
                closing.callback(os.close, fd)
                self._read_only.append(QemuObject(FDSET, each.base.fdset))
                commands.append(Command("add-fd", {"fdset-id": each.base.fdset}, (fd,)))
            await self._execute(commands)

    async def _execute(self, commands: Sequence[Command]) -> None:
        for result in await self._context.monitor.execute_all(commands, timeout=_SWITCH_TIMEOUT):
            if isinstance(result, QmpError):
                raise result

    async def switch(self) -> None:
        """Put all overlays in, or none. Raises what `Monitor.execute` raises, SystemFailure if an image stays writable.

        The guest must not run.
        """
        if not self.frozen:
            return
        actions = [
            {
                "type": "blockdev-snapshot",
                "data": {"node": each.base.top_node, "overlay": each.overlay.format_node},
            }
            for each in self.frozen
        ]
        await self._context.monitor.execute("transaction", {"actions": actions}, timeout=_SWITCH_TIMEOUT)
        for each in self.frozen:
            each.disk.images[:] = [each.overlay]
            if each.base.backing is not None:
                each.base.backing = each.base.backing._replace(is_writable=False)
        with contextlib.suppress(SystemFailure):
            # The journal has both images already.
            self._context.register.save()
        await self._check_read_only()

    async def _check_read_only(self) -> None:
        found = await self._context.monitor.execute("query-named-block-nodes", {"flat": True})
        read_only = {each["node-name"]: bool(each["ro"]) for each in found}
        for each in self.frozen:
            if not read_only.get(each.base.top_node):
                raise SystemFailure(f"QEMU keeps the image of {each.disk.name} open for writing", 5)

    async def finish(self) -> None:
        """Drop the read-only descriptors, of which QEMU has its own."""
        # On 7.2 the hot-plug mechanism drops them once the guest runs.
        with contextlib.suppress(VmspawnError):
            await self._hotplug.remove(*self._read_only)
        self._context.register.save()

    async def undo(self) -> None:
        """Take the overlays away again that were not put in; those that were stay."""
        with contextlib.suppress(VmspawnError):
            await self._hotplug.remove(*self._read_only)
        for each in self.frozen:
            if each.disk.images[0] is each.overlay:
                continue
            each.overlay.base = None
            with contextlib.suppress(VmspawnError):
                await images.dismantle(self._hotplug, each.disk, each.overlay)
            if each.overlay in each.disk.images:
                each.disk.images.remove(each.overlay)
            each.overlay.close_backing()
        with contextlib.suppress(SystemFailure):
            self._context.register.save()


def needs_overlay(disk: AttachedDisk) -> bool:
    """Whether the guest may write to the disk's image."""
    return disk.state is State.ATTACHED and bool(disk.images) and disk.images[0].writable


def _commands(each: Frozen) -> list[Command]:
    """What opens the overlay. It gets its base from `blockdev-snapshot`."""
    base, each.overlay.base = each.overlay.base, None
    try:
        return image_nodes.commands(each.disk.disk, each.overlay)
    finally:
        each.overlay.base = base

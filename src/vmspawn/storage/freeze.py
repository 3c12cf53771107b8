# SPDX-License-Identifier: LGPL-2.1-or-later
"""Puts an overlay on the image of each writable disk, so that the image does not change any more.

1. `prepare` opens the overlays, which the disks do not use yet, while the guest runs. It adds a read-only descriptor of
   each image to the set that QEMU opened the image from.
2. `switch` puts all overlays on their images at once, while the guest is stopped. QEMU reopens the images with the
   read-only descriptors.
3. `finish` removes these descriptors from the sets. `undo` removes the overlays instead, before the switch.

If a manager dies meanwhile, its journal has both images of each disk, and `recovery.py` keeps the one in use.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Awaitable, Callable, Sequence
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


class Wanted(NamedTuple):
    """An overlay to make: its disk, the number of its image, and its size in bytes."""

    disk: AttachedDisk
    number: int
    size: int


class Frozen(NamedTuple):
    """A disk with its image, and with the overlay for that image."""

    disk: AttachedDisk
    base: Image
    overlay: Image


class Freeze:
    """One freeze of a machine's disks. The caller prevents other changes of disks meanwhile."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._hotplug = context.hotplug
        self.frozen: list[Frozen] = []
        self._read_only: list[QemuObject] = []
        #: True once the disks use the overlays.
        self.is_switched = False

    @property
    def candidates(self) -> list[AttachedDisk]:
        """The disks that need an overlay."""
        return [each for each in self._context.register if needs_overlay(each)]

    async def prepare(
        self,
        make: Callable[[Sequence[Wanted]], Awaitable[Sequence[Image]]],
        open_read_only: Callable[[Sequence[Frozen]], Awaitable[Sequence[int]]],
    ) -> None:
        """Open the overlays.

        `make` makes all overlays or none. `open_read_only` returns read-only descriptors of the images below the
        overlays, which are closed here. Raises what these raise, or what `Monitor.execute` raises; then `undo` must
        follow.
        """
        sizes = await self._sizes()
        fresh_number = self._context.register.fresh_number
        wanted = [Wanted(disk, fresh_number(), sizes[disk.identifiers.pivot]) for disk in self.candidates]
        overlays = await make(wanted)
        for disk, overlay in zip((each.disk for each in wanted), overlays, strict=True):
            base = overlay.base = disk.images[0]
            disk.images.append(overlay)
            self.frozen.append(Frozen(disk, base, overlay))
        commands = [command for each in self.frozen for command in _commands(each)]
        spent = [part for each in self.frozen for part in image_nodes.spent(each.overlay)]
        self._context.register.save()
        await self._execute(commands)
        await self._hotplug.remove(*spent)
        for each in self.frozen:
            image_nodes.made(each.overlay)
        await self._lend(await open_read_only(self.frozen))

    async def _sizes(self) -> dict[str, int]:
        found = await self._context.monitor.execute("query-named-block-nodes", {"flat": True})
        return {each["node-name"]: int(each["image"]["virtual-size"]) for each in found}

    async def _lend(self, descriptors: Sequence[int]) -> None:
        """Pass the read-only descriptors to QEMU.

        An adoption removes their descriptor sets, because the journal lists them as parts of no image.
        """
        try:
            commands = []
            for each, fd in zip(self.frozen, descriptors, strict=True):
                self._read_only.append(QemuObject(FDSET, each.base.fdset))
                commands.append(Command("add-fd", {"fdset-id": each.base.fdset}, (fd,)))
            await self._execute(commands)
        finally:
            for fd in descriptors:
                os.close(fd)

    async def _execute(self, commands: Sequence[Command]) -> None:
        for result in await self._context.monitor.execute_all(commands, timeout=_SWITCH_TIMEOUT):
            if isinstance(result, QmpError):
                raise result

    async def switch(self) -> None:
        """Put all overlays on their images, or none, while the guest is stopped.

        Raises what `Monitor.execute` raises, or SystemFailure if QEMU keeps an image open for writing.
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
        self.is_switched = True
        for each in self.frozen:
            each.disk.images[:] = [each.overlay]
            if each.base.backing is not None:
                each.base.backing = each.base.backing._replace(is_writable=False)
        with contextlib.suppress(SystemFailure):
            # The journal names both images already.
            self._context.register.save()
        await self._check_read_only()

    async def _check_read_only(self) -> None:
        found = await self._context.monitor.execute("query-named-block-nodes", {"flat": True})
        read_only = {each["node-name"]: bool(each["ro"]) for each in found}
        for each in self.frozen:
            if not read_only.get(each.base.top_node):
                raise SystemFailure(f"QEMU keeps the image of {each.disk.name} open for writing", errno.EIO)

    async def finish(self) -> None:
        """Remove the read-only descriptors from the sets; QEMU's nodes have duplicates."""
        # QEMU 7.2 delays that until the guest runs; `Hotplug` then repeats it.
        with contextlib.suppress(VmspawnError):
            await self._hotplug.remove(*self._read_only)
        self._context.register.save()

    async def undo(self) -> None:
        """Remove the overlays that no disk uses yet; the others stay."""
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
    """Return whether the guest may write to the disk's image."""
    return disk.state is State.ATTACHED and bool(disk.images) and disk.images[0].is_writable


def _commands(each: Frozen) -> list[Command]:
    """Return the commands that open an overlay. `blockdev-snapshot` sets its base later."""
    base, each.overlay.base = each.overlay.base, None
    try:
        return image_nodes.commands(each.disk.disk, each.overlay)
    finally:
        each.overlay.base = base

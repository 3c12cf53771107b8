# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attaching and detaching disks while the machine runs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..aio.tasks import Tasks
from ..errors import NoSuchStorage, QmpError, StoragePending, SystemFailure, Timeout, VmspawnError
from ..hotplug.places import Layout
from ..qmp.events import Event
from ..qmp.monitor import Monitor
from ..qmp.run_state import RunState
from ..timeouts import DETACH_TIMEOUT
from . import admission, buses, failures, image_nodes, media, pending, statistics, swap
from .attached_disk import AttachedDisk, Removal, State
from .backing import Backing
from .changes import CHANGE_TIMEOUT, Changes, check_not_boot
from .context import Context
from .disk import Disk
from .explain import explain
from .iothread_controller import threaded_scsi
from .nodes import Identifiers
from .register import Register, to_json
from .statistics import Statistics
from .steps import AddDevice, do_all, plan, undo_steps, unplug

#: Seconds after which an undo that QEMU refused is tried again: somebody uses the node through QMP, and may stop.
_REFUSED_RETRY = 2.0

#: Seconds that a failed attach waits for its own clean-up before it reports the failure; the clean-up goes on.
_UNWIND_TIMEOUT = 10.0

#: Events of our own, in the streams beside QEMU's.
ATTACHED_EVENT = "StorageAttached"
DETACHING_EVENT = "StorageDetaching"
DETACHED_EVENT = "StorageDetached"


class Storage:
    """The disks of a running machine.

    `journal` must have saved `state_text` when it returns.
    """

    def __init__(
        self, monitor: Monitor, run_state: RunState, layout: Layout, *, journal: Callable[[], None] = lambda: None
    ) -> None:
        self._monitor = monitor
        self._journal = journal
        self._register = Register()
        self._context = Context(monitor, run_state, layout, self._save)
        self._context.removal_requested = self._removal_requested
        self._tasks = Tasks()
        #: What can be done to disks that stay.
        self.changes = Changes(self._context, self._register, self._tasks)
        monitor.listen(self._event)

    def __iter__(self) -> Iterator[AttachedDisk]:
        return iter(self._register)

    @property
    def ports_free(self) -> int:
        """How many PCI devices can still be plugged in."""
        return self._context.layout.pci.free

    @property
    def ports(self) -> int:
        """How many places there are for hot-plugged PCI devices."""
        return len(self._context.layout.pci.places)

    def state_text(self) -> str:
        """The register, in JSON."""
        place = self._context.threaded_place
        head = f'"next": {self._context.next_number}, "threaded-scsi": {to_json(place and list(place))}'
        return f'{{{head}, "attachments": {self._register.text()}}}'

    def _save(self, changed: AttachedDisk | None) -> None:
        self._register.changed(changed)
        self._journal()

    # At boot.

    def add_boot_disk(self, attachment: AttachedDisk) -> None:
        """Enter a disk that QEMU was started with."""
        attachment.boot = True
        attachment.state = State.ATTACHED
        attachment.done = plan(attachment)
        for image in attachment.images:
            image.done = image_nodes.plan(image)
            self._context.numbers_used_up_to(image.number)
        attachment.settled.set()
        self._register.add(attachment)
        self._context.numbers_used_up_to(attachment.identifiers.number)

    async def release_boot_descriptors(self) -> None:
        """Drop the descriptor sets of the boot disks: their nodes are open by now."""
        for attachment in self:
            for image in attachment.images if attachment.boot else ():
                await image_nodes.release(self._context, image)
        self._register.changed(None)

    # Taking over from a manager that died.

    def load(self, saved: dict[str, Any]) -> None:
        """Enter the disks of a register that was saved. Raises KeyError, TypeError or ValueError if it is none."""
        # Loaded where it is needed: most machines keep their manager.
        from . import recovery

        for attachment in recovery.load(self._context, saved):
            self._register.add(attachment)

    async def reconcile(self, foreign_fdsets: Sequence[int]) -> list[str]:
        """Bring the register and QEMU together; returns in words what was found.

        `foreign_fdsets` are descriptor sets that are not ours. Raises Timeout or NotConnected.
        """
        from . import recovery

        work = recovery.Adoption(self._context, self._unwind)
        await work.run(self, foreign_fdsets)
        return work.notes

    # Attaching.

    async def attach(self, disk: Disk, backing: Backing | None) -> AttachedDisk:
        """Attach a disk whose image is open; returns once QEMU has plugged the device in.

        Owns `backing` from the call on; an optical drive may have none. Raises StorageExists, BadConfig,
        ConfigNotSupported, NoFreePort, QmpError, SystemFailure, Timeout or NotConnected; then nothing of the disk is
        left behind. When cancelled, a task of the machine's takes back what was done.
        """
        try:
            attachment = await self._admit(disk, backing)
        except BaseException:
            if backing is not None:
                backing.close()
            raise
        self._register.add(attachment)
        image = attachment.image
        try:
            await do_all(self._context, attachment)
            if image is None:
                await media.empty(self._context, attachment)
            if attachment.gone.is_set():
                raise NoSuchStorage(f"{disk.name} was removed through QMP while it was being attached")
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is raised again
            await self._give_up(attachment, error)
            raise explain(error, disk.name, image) from None
        attachment.state = State.ATTACHED
        attachment.settled.set()
        # Where the device is there, the next manager knows that this came to its end; of an empty tray it cannot tell.
        if image is None:
            self._context.journal(attachment)
        else:
            self._register.changed(attachment)
        self._context.publish(ATTACHED_EVENT, attachment)
        return attachment

    async def _admit(self, disk: Disk, backing: Backing | None) -> AttachedDisk:
        context = self._context
        is_threaded = disk.thread and disk.bus == "virtio-scsi"
        disk, serial, image, place = admission.admit(
            disk,
            backing,
            self._register,
            number=context.fresh_number(),
            layout=context.layout,
            pci=context.layout.pci,
            scsi=await threaded_scsi(context) if is_threaded else context.layout.scsi,
            what=disk.path or disk.name,
        )
        images = [] if image is None else [image]
        return AttachedDisk(disk, Identifiers(context.fresh_number()), place, serial, images, limits=disk.limits)

    async def _give_up(self, attachment: AttachedDisk, error: BaseException) -> None:
        """Take back what a failed or cancelled attach has done. Whatever happens here, the caller raises `error`."""
        task = self._unwind(attachment)
        attachment.settled.set()
        if isinstance(error, Exception):
            await asyncio.wait({task}, timeout=_UNWIND_TIMEOUT)

    # Detaching.

    async def detach(self, name: str, *, timeout: float = DETACH_TIMEOUT, force: bool = False) -> bool:
        """Detach a disk; returns once it is really gone: device, nodes, descriptors, port.

        Raises NoSuchStorage, StorageImmutable for a boot disk, NotConnected, or StoragePending if the guest has not
        let go within `timeout` seconds. The removal then goes on, and a later call waits for the same removal.

        `force` takes the image away first, so that the host has its file back whatever the guest does, who sees I/O
        errors from then on. Returns False then if the device is still there after `timeout`, instead of raising.
        """
        attachment = self._register.find(name)
        check_not_boot(attachment, "detached")
        deadline = asyncio.get_running_loop().time() + timeout
        try:
            async with asyncio.timeout_at(deadline):
                await attachment.settled.wait()
        except TimeoutError:
            raise StoragePending(f"{name} is still being attached", hint="try again") from None
        if force:
            await self._take_away(attachment)
        task = self._unwind(attachment)
        await asyncio.wait({task}, timeout=deadline - asyncio.get_running_loop().time())
        if not task.done():
            if force:
                return False
            why = pending.why(attachment, self._context.run_state)
            raise StoragePending(f"{why} (waited {timeout:g} s)", hint=pending.HINT)
        self._tasks.result(task)
        return True

    async def _take_away(self, attachment: AttachedDisk) -> None:
        going = attachment.unwinding is not None and AddDevice.name in attachment.done
        if going and not buses.TABLE[attachment.disk.bus].asks:
            # The device goes in a moment. (QEMU does not let go of a node that is changed while its device goes.)
            return
        # From here on nobody else changes the disk. The guest is asked once the image is gone.
        self._begin_removal(attachment)

        async def work() -> None:
            async with attachment.lock:
                await swap.take_away(self._context, attachment)

        try:
            await self._tasks.run(
                work(), f"taking the image of {attachment.name} away", timeout=CHANGE_TIMEOUT, hint=pending.STORAGE_HINT
            )
        except VmspawnError as error:
            # Then at least the guest is asked.
            self._unwind(attachment)
            raise explain(error, attachment.name, None) from None

    def _unwind(self, attachment: AttachedDisk) -> asyncio.Task[None]:
        """The one task that takes the attachment apart; started if it is not under way."""
        self._begin_removal(attachment)
        if attachment.unwinding is None:
            attachment.unwinding = self._tasks.start(self._undo_all(attachment))
        else:
            attachment.nudge.set()
        return attachment.unwinding

    def _begin_removal(self, attachment: AttachedDisk) -> None:
        if attachment.removal is None:
            attachment.state = State.DETACHING
            attachment.removal = Removal()

    async def _undo_all(self, attachment: AttachedDisk) -> None:
        was_attached = attachment.settled.is_set()
        assert attachment.removal is not None
        # A journal that is behind does no harm here: what is undone already is found undone.
        with contextlib.suppress(SystemFailure):
            self._context.journal(attachment)
        while attachment.done:
            try:
                await self._undo(attachment)
            except (QmpError, Timeout, SystemFailure) as error:
                attachment.removal.answer = error.description if isinstance(error, QmpError) else str(error)
                await attachment.wait_for_news(_REFUSED_RETRY)
        attachment.close_backings()
        self._register.remove(attachment)
        with contextlib.suppress(SystemFailure):
            self._context.journal(attachment)
        if was_attached:
            self._context.publish(DETACHED_EVENT, attachment)

    async def _undo(self, attachment: AttachedDisk) -> None:
        # The guest may take for ever, and meanwhile the image can be taken away by force.
        await unplug(self._context, attachment)
        async with attachment.lock:
            await undo_steps(self._context, attachment, tuple(attachment.done))

    # Looking.

    async def sizes(self) -> dict[str, int]:
        """The size in bytes of each disk as the guest sees it, by name; 0 is an optical drive without a medium."""
        found: list[dict[str, Any]] = await self._monitor.execute("query-named-block-nodes", {"flat": True})
        by_node = {node["node-name"]: int(node["image"]["virtual-size"]) for node in found}
        return {each.name: by_node.get(each.identifiers.pivot, 0) for each in self}

    async def statistics(self) -> dict[str, Statistics]:
        """What was read and written, by the disk's name; one that is coming or going may be missing."""
        return await statistics.read(self._context, self)

    def why_pending(self, attachment: AttachedDisk) -> str:
        """Why a removal has not completed, as far as can be told; empty if none is under way."""
        return pending.why(attachment, self._context.run_state) if attachment.removal else ""

    # Tasks and events.

    def close(self) -> None:
        """Stop all clean-up: QEMU is gone, and everything in it too."""
        self._tasks.cancel()
        for attachment in self:
            attachment.close_backings()

    def _removal_requested(self, attachment: AttachedDisk) -> None:
        assert attachment.removal is not None
        why = pending.why(attachment, self._context.run_state)
        self._context.publish(DETACHING_EVENT, attachment, requests=attachment.removal.requests, reason=why)

    def _event(self, event: Event) -> None:
        if event.name == "DEVICE_DELETED" and event.data:
            self._device_deleted(event.data.get("device"))
        elif event.name == failures.QEMU_EVENT:
            self._request_failed(event)
        elif event.name == "RESUME" and self._context.deferred_fdsets:
            self._tasks.start(self._remove_deferred_fdsets())

    def _request_failed(self, event: Event) -> None:
        attachment = failures.attachment_of(event, self)
        if attachment is not None:
            failure = failures.failure(event)
            attachment.failures += 1
            attachment.last_failure = str(failure)
            self._context.publish(failures.FAILED_EVENT, attachment, **failure._asdict())

    def _device_deleted(self, device: object) -> None:
        """Whoever removed it, we, the guest or somebody's raw device_del: what stands below it is taken apart."""
        for attachment in self:
            if attachment.identifiers.device == device:
                attachment.gone.set()
                if attachment.state is State.ATTACHED:
                    self._unwind(attachment)

    async def _remove_deferred_fdsets(self) -> None:
        while self._context.deferred_fdsets:
            try:
                await self._context.remove(self._context.deferred_fdsets.pop())
            except VmspawnError:
                return

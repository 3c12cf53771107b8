# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attaching and detaching drives while the machine runs, and the register of those that are there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from ..errors import (
    BadConfig,
    ConfigNotSupported,
    NoSuchStorage,
    NotConnected,
    QmpError,
    StorageExists,
    StorageImmutable,
    StoragePending,
    SystemFailure,
    Timeout,
    VmspawnError,
)
from ..qmp.monitor import Event, Monitor
from ..qmp.runstate import RunState
from . import buses
from . import drive as drives
from .attachment import Attachment, State
from .drive import Backing, Drive
from .nodes import Identifiers
from .ports import Layout
from .steps import STEP_BY_NAME, STEPS, Context

#: Seconds that a detach waits for the guest before it says that the removal is pending. sd-varlink's clients give up
#: after 45 s without an answer.
DETACH_TIMEOUT = 30.0

#: Seconds after which an undo that QEMU refused is tried again: somebody uses the node through QMP, and may stop.
_REFUSED_RETRY = 2.0

#: Seconds that a failed attach waits for its own clean-up before it reports the failure; the clean-up goes on.
_UNWIND_TIMEOUT = 10.0

#: Events of our own, in the streams beside QEMU's.
ATTACHED_EVENT = "StorageAttached"
DETACHED_EVENT = "StorageDetached"


class Storage:
    """The drives of a running machine.

    `journal` is called ahead of each step and must have saved `to_state` when it returns.
    """

    def __init__(
        self, monitor: Monitor, run_state: RunState, layout: Layout, *, journal: Callable[[], None] = lambda: None
    ) -> None:
        self._monitor = monitor
        self._context = Context(monitor, run_state, layout)
        self._journal = journal
        self._attachments: dict[str, Attachment] = {}
        self._next_number = 0
        self._tasks: set[asyncio.Task[None]] = set()
        monitor.listen(self._event)

    def __iter__(self) -> Iterator[Attachment]:
        return iter(tuple(self._attachments.values()))

    @property
    def ports_free(self) -> int:
        """How many PCI devices can still be plugged in."""
        return self._context.layout.pci.free

    @property
    def ports(self) -> int:
        """How many places there are for hot-plugged PCI devices."""
        return len(self._context.layout.pci.places)

    def to_state(self) -> dict[str, Any]:
        """The register as JSON values."""
        return {"next": self._next_number, "attachments": [each.to_state() for each in self]}

    def add_boot_drive(self, attachment: Attachment) -> None:
        """Enter a drive that QEMU was started with."""
        attachment.boot = True
        attachment.state = State.ATTACHED
        attachment.done = [step.name for step in STEPS]
        attachment.settled.set()
        self._attachments[attachment.name] = attachment
        self._next_number = max(self._next_number, attachment.identifiers.number + 1)

    async def release_boot_descriptors(self) -> None:
        """Drop the descriptor sets of the boot drives: their nodes are open by now."""
        for attachment in self:
            if attachment.boot:
                await self._context.remove_fdset(attachment.identifiers.fdset)

    async def attach(self, drive: Drive, backing: Backing) -> Attachment:
        """Attach a drive whose image is open; returns once QEMU has plugged the device in.

        Owns `backing` from the call on. Raises StorageExists, BadConfig, ConfigNotSupported, NoFreePort, QmpError,
        SystemFailure, Timeout or NotConnected; then nothing of the drive is left behind. When cancelled, a task of the
        machine's takes back what was done.
        """
        try:
            attachment = self._admit(drive, backing)
        except BaseException:
            backing.close()
            raise
        try:
            for step in STEPS:
                attachment.done.append(step.name)
                self._journal()
                await step.do(self._context, attachment)
            if attachment.gone.is_set():
                raise NoSuchStorage(f"{drive.name} was removed through QMP while it was being attached")
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is raised again
            await self._give_up(attachment, error)
            raise _explain(error, drive) from None
        attachment.state = State.ATTACHED
        attachment.settled.set()
        self._journal()
        self._publish(ATTACHED_EVENT, attachment)
        return attachment

    def _admit(self, drive: Drive, backing: Backing) -> Attachment:
        """Check what can be checked, and choose everything that undoing will need."""
        drives.check_name(drive.name)
        bus = buses.TABLE[drives.check_bus(drive.bus)]
        if drive.name in self._attachments:
            raise StorageExists(f"a drive named {drive.name} exists already", hint=self._exists_hint(drive.name))
        self._check_not_attached(backing)
        image_format = drives.choose_format(backing, drive.format, what=drive.path or drive.name)
        serial = drives.check_serial(drive.serial) if drive.serial else drives.serial_for(drive.name)
        if not bus.writable and backing.writable:
            raise ConfigNotSupported(f"bus {drive.bus} is read-only", hint="open the image read-only")
        if not backing.size and bus.writable:
            raise BadConfig(
                f"{drive.path or drive.name} is empty", hint="make an image with: qemu-img create IMAGE SIZE"
            )
        layout = self._context.layout
        place = (layout.scsi if bus.pool == "scsi" else layout.pci).take()
        identifiers = Identifiers(self._next_number)
        self._next_number += 1
        attachment = Attachment(drive, identifiers, place, backing, image_format, serial)
        self._attachments[drive.name] = attachment
        return attachment

    def _exists_hint(self, name: str) -> str:
        if self._attachments[name].state is State.DETACHING:
            return "its removal is pending; the name is free once the guest has let go"
        return "choose another name, or detach it first"

    def _check_not_attached(self, backing: Backing) -> None:
        """QEMU's image lock does not see one open file that is passed twice, so look ourselves."""
        for other in self:
            if other.backing.identity == backing.identity and (other.backing.writable or backing.writable):
                raise StorageExists(
                    f"this file is attached already, as {other.name}",
                    hint="attach it read-only in both places, or attach a copy",
                )

    async def _give_up(self, attachment: Attachment, error: BaseException) -> None:
        """Take back what a failed or cancelled attach has done. Whatever happens here, the caller raises `error`."""
        task = self._unwind(attachment)
        attachment.settled.set()
        if isinstance(error, Exception):
            await asyncio.wait({task}, timeout=_UNWIND_TIMEOUT)

    async def detach(self, name: str, *, timeout: float = DETACH_TIMEOUT) -> None:
        """Detach a drive; returns once it is really gone: device, nodes, descriptors, port.

        Raises NoSuchStorage, StorageImmutable for a boot drive, NotConnected, or StoragePending if the guest has not
        let go within `timeout` seconds. The removal then goes on, and a later call waits for the same removal.
        """
        attachment = self._find(name)
        if attachment.boot:
            raise StorageImmutable(f"{name} has been there from boot and cannot be detached while the machine runs")
        deadline = asyncio.get_running_loop().time() + timeout
        try:
            async with asyncio.timeout_at(deadline):
                await attachment.settled.wait()
        except TimeoutError:
            raise StoragePending(f"{name} is still being attached", hint="try again") from None
        task = self._unwind(attachment)
        await asyncio.wait({task}, timeout=deadline - asyncio.get_running_loop().time())
        if not task.done():
            raise StoragePending(_why_pending(attachment, self._context.run_state, timeout), hint=_PENDING_HINT)
        if task.cancelled():
            raise NotConnected("the machine ended")
        if error := task.exception():
            raise error

    def _find(self, name: str) -> Attachment:
        try:
            return self._attachments[name]
        except KeyError:
            raise NoSuchStorage(f"there is no drive named {name}", hint="see: vmctl list-disks MACHINE") from None

    def _unwind(self, attachment: Attachment) -> asyncio.Task[None]:
        """The one task that takes the attachment apart; started if it is not under way."""
        if attachment.unwinding is None:
            attachment.state = State.DETACHING
            attachment.unwinding = self._start(self._undo_all(attachment))
        attachment.nudge.set()
        return attachment.unwinding

    async def _undo_all(self, attachment: Attachment) -> None:
        was_attached = attachment.settled.is_set()
        self._journal()
        while attachment.done:
            step = STEP_BY_NAME[attachment.done[-1]]
            try:
                await step.undo(self._context, attachment)
            except (QmpError, Timeout) as error:
                attachment.answer = error.description if isinstance(error, QmpError) else str(error)
                await attachment.wait_for_news(_REFUSED_RETRY)
                continue
            attachment.done.pop()
            self._journal()
        attachment.close_backing()
        del self._attachments[attachment.name]
        self._journal()
        if was_attached:
            self._publish(DETACHED_EVENT, attachment)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        # That QEMU ended meanwhile is told elsewhere; looking at the error keeps asyncio from logging it.
        if not task.cancelled():
            task.exception()

    def close(self) -> None:
        """Stop all clean-up: QEMU is gone, and everything in it too."""
        for task in tuple(self._tasks):
            task.cancel()
        for attachment in self:
            attachment.close_backing()

    async def sizes(self) -> dict[str, int]:
        """The size in bytes of each drive as the guest sees it, by name."""
        found: list[dict[str, Any]] = await self._monitor.execute("query-named-block-nodes", {"flat": True})
        by_node = {node["node-name"]: int(node["image"]["virtual-size"]) for node in found}
        return {each.name: by_node.get(each.identifiers.format_node, each.backing.size) for each in self}

    def _publish(self, event: str, attachment: Attachment) -> None:
        self._monitor.publish(Event(event, {"name": attachment.name}))

    def _event(self, event: Event) -> None:
        if event.name == "DEVICE_DELETED" and event.data:
            self._device_deleted(event.data.get("device"))
        elif event.name == "RESUME" and self._context.deferred_fdsets:
            self._start(self._remove_deferred_fdsets())

    def _device_deleted(self, device: object) -> None:
        """Whoever removed it, we, the guest or somebody's raw device_del: what stands below it is taken apart."""
        for attachment in self:
            if attachment.identifiers.device == device:
                attachment.gone.set()
                if attachment.state is State.ATTACHED:
                    self._unwind(attachment)

    async def _remove_deferred_fdsets(self) -> None:
        while self._context.deferred_fdsets:
            number = self._context.deferred_fdsets.pop()
            try:
                await self._context.remove_fdset(number)
            except VmspawnError:
                return


_PENDING_HINT = "the removal goes on and completes when the guest lets go; repeat the command to wait for it"


def _why_pending(attachment: Attachment, run_state: RunState, timeout: float) -> str:
    if not run_state.has_run.is_set():
        return f"{attachment.name} stays until the guest runs: it has not been started yet"
    if not run_state.running:
        return f"{attachment.name} stays while the guest is {run_state.status}: it cannot let go"
    return f"the guest has not let go of {attachment.name} within {timeout:g} s"


def _explain(error: BaseException, drive: Drive) -> BaseException:
    """The error in the user's words where we know what QEMU means."""
    import errno

    if isinstance(error, QmpError) and "Failed to get" in error.description and "lock" in error.description:
        return SystemFailure(
            f"another process uses the image of {drive.name} (QEMU could not lock it)",
            errno.EBUSY,
            hint="detach it from the other machine, or attach it read-only in both",
        )
    return error

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attaches and detaches devices that are described as lists of steps.

An attach enters all steps in the journal, and then sends the commands of all steps to QEMU together. A failed attach, a
detach and the clean-up after a crash undo the steps by the same code: first the device, which needs the guest, and then
the other steps in reverse order.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

from .. import log
from ..aio.gate import Gate
from ..aio.tasks import Tasks
from ..errors import QmpError, SystemFailure, Timeout, VmspawnError
from ..qmp.events import Event
from ..qmp.monitor import Monitor
from ..qmp.run_state import RunState
from ..qmp.saving import Saving
from . import pending
from .attachment import Attachment, Removal, State
from .journal import Journal
from .qemu_objects import QemuObject, device_ids, remove_objects
from .register import Register
from .step import DEVICE, Step
from .unplug import ask_until_gone

_A = TypeVar("_A", bound=Attachment)

#: Seconds between attempts to undo a step that QEMU refuses to undo, for example while a QMP client uses its object.
_REFUSED_RETRY = 2.0

#: Seconds that a failed attach waits for its own undo before it raises its error; the undo continues.
_UNWIND_TIMEOUT = 10.0


class Hotplug:
    """The attachments of a running machine."""

    def __init__(self, monitor: Monitor, run_state: RunState, journal: Journal, saving: Saving | None = None) -> None:
        self.monitor: Final = monitor
        self.run_state: Final = run_state
        self.journal: Final = journal
        self.tasks: Final = Tasks()
        #: Entered by each change of an attachment, except while the change waits for the guest. Closed while the
        #: machine's state is saved.
        self.gate: Final = Gate()
        #: Keeps QMP sessions from saving the machine's state while a device that QEMU cannot save is being plugged in,
        #: and delays that device while a session is about to save.
        self.saving: Final = saving or Saving()
        self._registers: dict[str, Register[Any]] = {}
        self._on_refused: dict[str, Callable[[Any, VmspawnError], Awaitable[str]]] = {}
        #: Objects whose removal QEMU 7.2 delays until the guest runs again.
        self.deferred: set[QemuObject] = set()
        monitor.listen(self._event)

    def register(
        self,
        kind: str,
        load: Callable[[dict[str, Any]], _A],
        saved: Mapping[str, Any],
        more: Callable[[], Mapping[str, object]] = dict,
        on_refused: Callable[[_A, VmspawnError], Awaitable[str]] | None = None,
    ) -> Register[_A]:
        """Make the register of a kind of attachment. `Register` explains the first four arguments.

        `on_refused` is called when QEMU has refused to undo a step. It may undo the steps in another way, and returns
        the reason why the attachment still exists.
        """
        register = Register(self.journal, kind, load, saved, more)
        self._registers[kind] = register
        if on_refused is not None:
            self._on_refused[kind] = on_refused
        return register

    # Attaching.

    async def attach(self, attachment: Attachment, finish: Callable[[], Awaitable[None]] | None = None) -> None:
        """Do all steps, then call `finish`; returns when QEMU has plugged in the device.

        Raises what `Monitor.execute` raises, SystemFailure, or the error that the attachment's `vanished` returns. The
        steps are undone first; after `_UNWIND_TIMEOUT` or a cancellation, a task of the machine continues the undo.
        """
        register = self._registers[attachment.kind]
        register.add(attachment)
        try:
            async with self.gate.together():
                await self._do_all(attachment)
                if finish is not None:
                    await finish()
            if await self._is_gone(attachment):
                raise attachment.vanished()
        except BaseException as error:
            await self._give_up(attachment, error)
            raise
        attachment.state = State.ATTACHED
        attachment.settled.set()
        # The journal names all steps already, and an adoption treats an attach as successful if the device exists. So
        # the journal is written again only for an attachment that needs more than its device to be complete.
        if finish is None or attachment.is_whole:
            register.changed(attachment)
        else:
            register.save(attachment)
        if attachment.events is not None:
            self.publish(attachment.events.attached, attachment)

    async def _is_gone(self, attachment: Attachment) -> bool:
        """Return whether the device was removed since it was plugged in.

        `gone` alone is no proof: after an adoption, the event may be about an earlier controller of the same name.
        """
        if attachment.gone.is_set() and attachment.device in await device_ids(self.monitor):
            attachment.gone.clear()
        return attachment.gone.is_set()

    async def _do_all(self, attachment: Attachment) -> None:
        steps = attachment.plan()
        attachment.done = [step.name for step in steps]
        commands = [command for step in steps for command in step.begin()]
        spent = [each for step in steps for each in step.spent()]
        log.debug(f"{attachment.name}: does {', '.join(attachment.done)}")
        try:
            self.save(attachment)
        except SystemFailure:
            attachment.done.remove(DEVICE)
            raise
        results = await self.monitor.execute_all(commands, behind=[each.removal for each in spent])
        if isinstance(results[-1], QmpError):
            # The last command, device_add, has failed, so there is no device to unplug. (The device depends on all
            # other steps, so device_add fails if one of them fails. The exception is a step that fails because a QMP
            # client has made an object with one of vmspawn's names: the device then uses the client's object.)
            attachment.done.remove(DEVICE)
        for result in results:
            if isinstance(result, QmpError):
                raise result
        for step in steps:
            step.made()
        self.record_deferred(*spent)

    async def _give_up(self, attachment: Attachment, error: BaseException) -> None:
        """Undo a failed or cancelled attach, before the caller raises `error`."""
        attachment.has_failed = True
        task = self.unwind(attachment)
        attachment.settled.set()
        if isinstance(error, Exception):
            await asyncio.wait({task}, timeout=_UNWIND_TIMEOUT)

    # Detaching.

    async def wait_settled(self, attachment: Attachment, deadline: float) -> bool:
        """Wait until the attach has succeeded or failed; returns False if the deadline passes first."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await attachment.settled.wait()
        return attachment.settled.is_set()

    async def detach(self, attachment: Attachment, deadline: float) -> bool:
        """Undo all steps of an attachment; returns True when they are undone, False if the deadline passes first.

        The removal then continues, and a later call waits for the same removal. Raises NotConnected.
        """
        task = self.unwind(attachment)
        await asyncio.wait({task}, timeout=deadline - asyncio.get_running_loop().time())
        if not task.done():
            self.begin_removal(attachment).is_reported = True
            return False
        self.tasks.result(task)
        return True

    def begin_removal(self, attachment: Attachment) -> Removal:
        """Mark the attachment as being detached, which excludes other changes."""
        if attachment.removal is None:
            attachment.state = State.DETACHING
            attachment.removal = Removal()
        return attachment.removal

    def unwind(self, attachment: Attachment) -> asyncio.Task[None]:
        """Return the task that undoes all steps of the attachment; starts the task if it does not exist."""
        removal = self.begin_removal(attachment)
        if attachment.unwinding is None:
            attachment.unwinding = self.tasks.start(self._undo_all(attachment, removal))
        else:
            attachment.nudge.set()
        return attachment.unwinding

    async def _undo_all(self, attachment: Attachment, removal: Removal) -> None:
        # An outdated journal is harmless here: an adoption finds the steps undone.
        with contextlib.suppress(SystemFailure):
            self.save(attachment)
        while attachment.done:
            try:
                await self._unplug(attachment, removal)
                async with self.gate.together(), attachment.lock:
                    await self.undo_steps(attachment, tuple(attachment.done))
            except (QmpError, Timeout, SystemFailure) as error:
                removal.refusals += 1
                removal.answer = await self._explain_refusal(attachment, error)
                if attachment.done:
                    await attachment.wait_for_news(_REFUSED_RETRY)
        attachment.close()
        self._registers[attachment.kind].remove(attachment)
        with contextlib.suppress(SystemFailure):
            self.save(attachment)
        # A failed attach has no events, except if clients know of its removal.
        if attachment.events is not None and (removal.is_reported or not attachment.has_failed):
            self.publish(attachment.events.detached, attachment)

    async def _explain_refusal(self, attachment: Attachment, error: VmspawnError) -> str:
        if attachment.kind in self._on_refused:
            with contextlib.suppress(QmpError, Timeout, SystemFailure):
                return await self._on_refused[attachment.kind](attachment, error)
        return error.description if isinstance(error, QmpError) else str(error)

    async def _unplug(self, attachment: Attachment, removal: Removal) -> None:
        # The guest may never release the device, so the attachment is not locked meanwhile.
        if not attachment.has_device:
            return

        def on_request() -> None:
            if attachment.events is not None:
                removal.is_reported = True
                why = pending.why(attachment, self.run_state)
                self.publish(attachment.events.detaching, attachment, requests=removal.requests, reason=why)

        log.debug(f"{attachment.name}: undoes {DEVICE}")
        await ask_until_gone(self.monitor, self.run_state, attachment, removal, on_request)
        attachment.done.remove(DEVICE)
        self.save_after_undo(attachment)

    # Single steps.

    async def do_step(self, attachment: Attachment, name: str) -> None:
        """Do one step of an attached device. Raises what `Monitor.execute` raises."""
        self.enter_step(attachment, name)
        for result in await self.monitor.execute_all(_step(attachment, name).begin()):
            if isinstance(result, QmpError):
                raise result

    def enter_step(self, attachment: Attachment, name: str) -> None:
        """Enter a step in the journal before it is done."""
        attachment.enter_step(name)
        self.save_before_step(attachment)

    async def undo_steps(self, attachment: Attachment, names: Iterable[str]) -> None:
        """Undo the named steps that were done, except the device, and remove them from the journal.

        Raises what `remove_objects` raises; `undo_steps` can then be called again.
        """
        steps = [step for step in reversed(attachment.steps()) if step.name in attachment.done and step.name in names]
        if not steps:
            return
        for step in steps:
            log.debug(f"{attachment.name}: undoes {step.name}")
        await self.remove(*(each for step in steps for each in step.objects()))
        for step in steps:
            step.end()
            attachment.done.remove(step.name)
        self.save_after_undo(attachment)

    async def remove(self, *objects: QemuObject) -> None:
        """Remove objects in the given order; a missing object is not an error. Raises what `remove_objects` raises."""
        await remove_objects(self.monitor, objects)
        self.record_deferred(*objects)

    def record_deferred(self, *objects: QemuObject) -> None:
        """Record the removed objects that QEMU 7.2 keeps until the guest runs."""
        if not self.run_state.is_running:
            self.deferred.update(each for each in objects if each.kind.is_deferred)

    # The journal. It names all steps that QEMU has done, and may name more, because an undo takes "not found" as
    # success. So an attachment is entered once, with all its steps, and removed once, after all are undone.

    def save(self, attachment: Attachment) -> None:
        """Write the journal after a change of an attachment. Raises SystemFailure."""
        self._registers[attachment.kind].save(attachment)

    def save_before_step(self, attachment: Attachment) -> None:
        """Write the journal before a step of an attached device is done."""
        if attachment.state is not State.ATTACHING:
            self.save(attachment)

    def save_after_undo(self, attachment: Attachment) -> None:
        """Write the journal after a step of an attached device was undone."""
        if attachment.state is State.ATTACHED:
            self.save(attachment)

    # Events.

    def publish(self, event: str, attachment: Attachment, **data: Any) -> None:
        """Publish vmspawn's event about an attachment, in order with QEMU's events."""
        self.monitor.publish(Event(event, {"name": attachment.name, **data}))

    def _event(self, event: Event) -> None:
        if event.name == "DEVICE_DELETED" and event.data:
            self._device_deleted(event.data.get("device"))
        elif event.name == "RESUME" and self.deferred:
            self.tasks.start(self._remove_deferred())

    def _device_deleted(self, device: object) -> None:
        """Undo the other steps of a removed device, whether vmspawn, the guest or a QMP client removed it."""
        for attachment in self._all():
            if attachment.device == device:
                attachment.gone.set()
                if attachment.state is State.ATTACHED:
                    self.unwind(attachment)

    async def _remove_deferred(self) -> None:
        while self.deferred:
            try:
                await self.remove(self.deferred.pop())
            except VmspawnError:
                return

    def close(self) -> None:
        """Stop all removals, after QEMU's exit or because another manager adopts the machine."""
        self.tasks.cancel()
        for attachment in self._all():
            attachment.close()

    def _all(self) -> Sequence[Attachment]:
        return [attachment for register in self._registers.values() for attachment in register]


def _step(attachment: Attachment, name: str) -> Step:
    return next(step for step in attachment.steps() if step.name == name)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attach and detach anything that is a list of steps, whatever it is.

Attaching does the steps in order: the journal names all of them, then QEMU gets their commands in one go. A failed
attach, a detach and the clean-up after a crash all undo them by the same code: the device first, for which the guest is
asked, and then the rest from the end.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

from .. import log
from ..aio.tasks import Tasks
from ..errors import QmpError, SystemFailure, Timeout, VmspawnError
from ..qmp.events import Event
from ..qmp.monitor import Monitor
from ..qmp.run_state import RunState
from . import pending
from .attachment import Attachment, Removal, State
from .journal import Journal
from .qemu_objects import QemuObject, remove_objects
from .register import Register
from .step import DEVICE, Step
from .unplug import ask_until_gone

_A = TypeVar("_A", bound=Attachment)

#: Seconds after which an undo that QEMU refused is tried again: somebody uses the object through QMP, and may stop.
_REFUSED_RETRY = 2.0

#: Seconds that a failed attach waits for its own clean-up before it reports the failure; the clean-up goes on.
_UNWIND_TIMEOUT = 10.0


class Hotplug:
    """All attachments of a running machine."""

    def __init__(self, monitor: Monitor, run_state: RunState, journal: Journal) -> None:
        self.monitor: Final = monitor
        self.run_state: Final = run_state
        self.journal: Final = journal
        self.tasks: Final = Tasks()
        self._registers: dict[str, Register[Any]] = {}
        self._on_refused: dict[str, Callable[[Any, VmspawnError], Awaitable[str]]] = {}
        #: Objects whose removal QEMU 7.2 puts off until the guest runs again.
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
        """Make the register of a kind of attachment; the arguments are those of `Register`.

        `on_refused` is called when QEMU has refused an undo. It may find another way to undo the steps, and returns
        why the attachment is still there, in words.
        """
        register = Register(self.journal, kind, load, saved, more)
        self._registers[kind] = register
        if on_refused is not None:
            self._on_refused[kind] = on_refused
        return register

    # Attaching.

    async def attach(self, attachment: Attachment, finish: Callable[[], Awaitable[None]] | None = None) -> None:
        """Do all the steps, and `finish` after them; returns once QEMU has plugged the device in.

        Raises what `Monitor.execute` raises, SystemFailure, or the attachment's own `vanished`; then nothing is left
        behind. When cancelled, a task of the machine's takes back what was done.
        """
        register = self._registers[attachment.kind]
        register.add(attachment)
        try:
            await self._do_all(attachment)
            if finish is not None:
                await finish()
            if attachment.gone.is_set():
                raise attachment.vanished()
        except BaseException as error:
            await self._give_up(attachment, error)
            raise
        attachment.state = State.ATTACHED
        attachment.settled.set()
        # If the device is there, the next manager knows that this attach succeeded, unless more was to be done.
        if finish is None or attachment.is_whole:
            register.changed(attachment)
        else:
            register.save(attachment)
        if attachment.events is not None:
            self.publish(attachment.events.attached, attachment)

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
            # The last command is the device's, which need not be unplugged then. It depends on all other steps; it is
            # there in spite of a failure only if somebody else's object has the name of ours.
            attachment.done.remove(DEVICE)
        for result in results:
            if isinstance(result, QmpError):
                raise result
        for step in steps:
            step.made()
        self.removed(*spent)

    async def _give_up(self, attachment: Attachment, error: BaseException) -> None:
        """Take back what a failed or cancelled attach has done. Whatever happens here, the caller raises `error`."""
        attachment.has_failed = True
        task = self.unwind(attachment)
        attachment.settled.set()
        if isinstance(error, Exception):
            await asyncio.wait({task}, timeout=_UNWIND_TIMEOUT)

    # Detaching.

    async def wait_settled(self, attachment: Attachment, deadline: float) -> bool:
        """Wait until attaching has ended, however; False if the deadline passes first."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await attachment.settled.wait()
        return attachment.settled.is_set()

    async def detach(self, attachment: Attachment, deadline: float) -> bool:
        """Take an attachment apart; True once nothing of it is left, False if the deadline passes first.

        The removal then goes on, and a later call waits for the same removal. Raises NotConnected.
        """
        task = self.unwind(attachment)
        await asyncio.wait({task}, timeout=deadline - asyncio.get_running_loop().time())
        if not task.done():
            return False
        self.tasks.result(task)
        return True

    def begin_removal(self, attachment: Attachment) -> Removal:
        """From here on, nobody else changes the attachment."""
        if attachment.removal is None:
            attachment.state = State.DETACHING
            attachment.removal = Removal()
        return attachment.removal

    def unwind(self, attachment: Attachment) -> asyncio.Task[None]:
        """The one task that takes the attachment apart; started if it is not under way."""
        removal = self.begin_removal(attachment)
        if attachment.unwinding is None:
            attachment.unwinding = self.tasks.start(self._undo_all(attachment, removal))
        else:
            attachment.nudge.set()
        return attachment.unwinding

    async def _undo_all(self, attachment: Attachment, removal: Removal) -> None:
        was_attached = attachment.settled.is_set()
        # A journal that is behind does no harm here: what is undone already is found undone.
        with contextlib.suppress(SystemFailure):
            self.save(attachment)
        while attachment.done:
            try:
                await self._unplug(attachment, removal)
                async with attachment.lock:
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
        if was_attached and attachment.events is not None:
            self.publish(attachment.events.detached, attachment)

    async def _explain_refusal(self, attachment: Attachment, error: VmspawnError) -> str:
        if attachment.kind in self._on_refused:
            with contextlib.suppress(QmpError, Timeout, SystemFailure):
                return await self._on_refused[attachment.kind](attachment, error)
        return error.description if isinstance(error, QmpError) else str(error)

    async def _unplug(self, attachment: Attachment, removal: Removal) -> None:
        # The guest may take for ever, so the attachment is not locked meanwhile.
        if not attachment.has_device:
            return

        def on_request() -> None:
            if attachment.events is not None:
                why = pending.why(attachment, self.run_state)
                self.publish(attachment.events.detaching, attachment, requests=removal.requests, reason=why)

        log.debug(f"{attachment.name}: undoes {DEVICE}")
        await ask_until_gone(self.monitor, self.run_state, attachment, removal, on_request)
        attachment.done.remove(DEVICE)
        self.undone(attachment)

    # Single steps.

    async def do_step(self, attachment: Attachment, name: str) -> None:
        """Do a step of an attachment that is there. Raises what `Monitor.execute` raises."""
        self.enter_step(attachment, name)
        for result in await self.monitor.execute_all(_step(attachment, name).begin()):
            if isinstance(result, QmpError):
                raise result

    def enter_step(self, attachment: Attachment, name: str) -> None:
        """Enter a step in the journal, ahead of doing it."""
        attachment.enter_step(name)
        self.begun(attachment)

    async def undo_steps(self, attachment: Attachment, names: Iterable[str]) -> None:
        """Undo those of the steps that were done, none of them the device, and strike them from the journal.

        Raises what `remove_objects` raises; all of them can be undone again then.
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
        self.undone(attachment)

    async def remove(self, *objects: QemuObject) -> None:
        """Remove objects in that order; one that is not there is fine. Raises what `remove_objects` raises."""
        await remove_objects(self.monitor, objects)
        self.removed(*objects)

    def removed(self, *objects: QemuObject) -> None:
        """QEMU has let go of them, or on 7.2 will once the guest runs."""
        if not self.run_state.is_running:
            self.deferred.update(each for each in objects if each.kind.is_deferred)

    # The journal. What it says of an attachment is never less than what is there, and may be more, for an undo takes
    # "not there" as done. So an attachment that comes is entered once, with all its steps, and one that goes is struck
    # out in the end.

    def save(self, attachment: Attachment) -> None:
        """Write the journal after an attachment has changed. Raises SystemFailure."""
        self._registers[attachment.kind].save(attachment)

    def begun(self, attachment: Attachment) -> None:
        """Journal a step ahead of doing it."""
        if attachment.state is not State.ATTACHING:
            self.save(attachment)

    def undone(self, attachment: Attachment) -> None:
        """Journal that a step was undone."""
        if attachment.state is State.ATTACHED:
            self.save(attachment)

    # Events.

    def publish(self, event: str, attachment: Attachment, **data: Any) -> None:
        """Publish an event of our own about an attachment, in line with QEMU's."""
        self.monitor.publish(Event(event, {"name": attachment.name, **data}))

    def _event(self, event: Event) -> None:
        if event.name == "DEVICE_DELETED" and event.data:
            self._device_deleted(event.data.get("device"))
        elif event.name == "RESUME" and self.deferred:
            self.tasks.start(self._remove_deferred())

    def _device_deleted(self, device: object) -> None:
        """Take apart what the device stood on, whoever removed it: we, the guest, or somebody's raw device_del."""
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
        """Stop all clean-up: QEMU is gone with everything in it, or belongs to another manager."""
        self.tasks.cancel()
        for attachment in self._all():
            attachment.close()

    def _all(self) -> Sequence[Attachment]:
        return [attachment for register in self._registers.values() for attachment in register]


def _step(attachment: Attachment, name: str) -> Step:
    return next(step for step in attachment.steps() if step.name == name)

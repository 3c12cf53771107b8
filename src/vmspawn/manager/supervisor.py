# SPDX-License-Identifier: LGPL-2.1-or-later
"""Supervises one run of a machine until it ends: QEMU, the control socket, the console and the signals."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from ..aio.waiting import first_of
from ..boot.started import Launched, Started
from ..console.messages import Messages
from ..control.server import ControlServer, build_registry
from ..errors import ManagerFailed, StartError, VmspawnError
from ..host.notify import Notifier
from ..inside.inside import Inside
from ..machine.ending import End
from ..machine.running import Running, run
from ..timeouts import FAREWELL_TIMEOUT
from .front import Front
from .heartbeat import Heartbeat
from .preload import preload
from .registration import Registered
from .shutdown import Shutdown
from .signals import Signals, run_unless_ended

if TYPE_CHECKING:
    from .job import Job

#: Ends of QEMU that get a report in the cache.
_UNEXPECTED = ("qemu-died", "unknown")

#: Seconds to write the rest of the console's output.
_FLUSH_TIMEOUT = 5.0


async def supervise(
    started: Started, messages: Messages, *, on_ready: Callable[[bool], None] = lambda _: None, job: Job | None = None
) -> End:
    """Manage a machine, which was just launched or adopted, until it ends; returns its end. Owns `started`.

    `on_ready` is called when the machine is up. Its argument is False if a copy's clock shows the time of the snapshot.
    If there is a `job`, the machine ends with it.

    Raises StartError if QEMU does not come up, or ManagerFailed after a fault of vmspawn. A fault during a launch ends
    the machine. After any other fault the guest continues, and another manager can take over the machine.
    """
    machine = await _start(started, messages)
    if machine is None:
        return End.terminated()
    async with AsyncExitStack() as closing:
        try:
            return await _Supervision(machine, messages, closing).run(on_ready, job)
        except VmspawnError:
            await machine.leave()
            raise
        except Exception as error:
            raise await _leave(machine, error) from error


async def _start(started: Started, messages: Messages) -> Running | None:
    """Wait until QEMU is up. Returns None if a signal ended the machine first."""
    start = run(started, warn=messages.report, notice=messages.notice)
    is_ours = isinstance(started.origin, Launched)
    try:
        # An adoption takes a few seconds. Signals stay blocked until the machine is adopted and can be ended.
        if is_ours:
            return await run_unless_ended(started, start)
        machine = await start
        if not machine.has_lost_helper:
            messages.notice(f"adopted machine {machine.name} (QEMU is process {machine.pid})")
        return machine
    except VmspawnError:
        raise
    except Exception as error:
        raise _fault(started.config.name or "", error, runs_on=not is_ours) from error


async def _leave(machine: Running, error: Exception) -> ManagerFailed:
    """Leave a machine after a fault of vmspawn."""
    fault = _fault(machine.name, error, machine, runs_on=True)
    await machine.leave()
    return fault


def _fault(name: str, error: Exception, machine: Running | None = None, *, runs_on: bool) -> ManagerFailed:
    """Return the error for a fault of vmspawn, with the consequence for the machine."""
    what = f"the manager failed: {type(error).__name__}: {error}".splitlines()[0]
    report = _write_report(name, what, machine, error)
    becomes = f"the machine continues; adopt it with: vmctl adopt {name}" if runs_on else "the machine was ended"
    return ManagerFailed(f"{what}; {becomes}", hint=f"please report it, with {report}" if report else "")


def _write_report(name: str, what: str, machine: Running | None, error: BaseException | None = None) -> str:
    """Write a report, and return its path, or an empty string if no file descriptor is free to load the module."""
    try:
        from .report import write_report
    except OSError:
        return ""
    return write_report(name, what, machine, error)


class _Supervision:
    """One running machine, and the objects that serve it."""

    def __init__(self, machine: Running, messages: Messages, closing: AsyncExitStack) -> None:
        self._machine = machine
        self._messages = messages
        self._closing = closing
        self._notifier = Notifier()
        self._shutdown = Shutdown(machine, messages.notice, self._notifier)
        self._front = Front(machine, self._shutdown, messages)

    async def run(self, on_ready: Callable[[bool], None], job: Job | None) -> End:
        """Serve the machine until it has ended. Raises StartError, OSError."""
        machine, messages, closing = self._machine, self._messages, self._closing
        if machine.has_lost_helper:
            closing.callback(self._tidy_disks)
            closing.push_async_callback(machine.end)
            return await machine.wait()
        Signals(self._shutdown, self._front).listen()
        inside = Inside(machine)
        try:
            await inside.settle()
        except VmspawnError:
            await machine.give_up()
            raise
        heartbeat = Heartbeat(self._notifier)
        closing.callback(heartbeat.end)
        # This runs after `machine.end`, because until then QEMU locks the snapshot and the images.
        closing.callback(self._tidy_disks)
        server = ControlServer(machine.directory, build_registry(machine, inside), on_failed=machine.failed)
        # This runs after `machine.end`: when a client's connection ends, nothing is left of the machine.
        closing.callback(server.close)
        closing.push_async_callback(machine.end)
        closing.callback(inside.close)
        registered = Registered(machine, messages.notice)
        closing.push_async_callback(registered.end)
        closing.callback(self._front.close)
        closing.callback(self._shutdown.close)
        # READY promises that from then on the package may be upgraded, moved or removed.
        await preload(server)
        await self._register(registered)
        on_ready(inside.is_clock_set)
        messages.notice(f"machine {machine.name} is running; see: vmctl status {machine.name}")
        if not inside.is_clock_set:
            messages.notice("the guest's clock shows the time of the snapshot, because no agent runs in the guest")
        self._front.open()
        status = f"Machine {machine.name} is running"
        self._notifier.send(READY=1, STATUS=status, X_VMSPAWN_LEADER_PID=machine.pid)
        heartbeat.begin()
        if job is None:
            return await self._until_end(server)
        job.start(machine)
        task = asyncio.create_task(job.until_done(machine))
        try:
            end = await self._until_end(server)
        finally:
            task.cancel()
        await job.finish(end)
        return end

    def _tidy_disks(self) -> None:
        if self._machine.has_ended:
            from .tidying import tidy_disks

            tidy_disks(self._machine, self._messages)

    async def _register(self, registered: Registered) -> None:
        try:
            await registered.begin()
        except StartError:
            await self._machine.give_up()
            raise

    async def _until_end(self, server: ControlServer) -> End:
        end = await self._machine.wait()
        self._notifier.send(STOPPING=1, STATUS=end.message[:1].upper() + end.message[1:])
        if self._machine.config.console != "native":
            await first_of(self._machine.console.ended, timeout=_FLUSH_TIMEOUT)
        await server.finish(timeout=FAREWELL_TIMEOUT)
        if end.reason in _UNEXPECTED:
            self._report(end)
        return end

    def _report(self, end: End) -> None:
        if path := _write_report(self._machine.name, end.message, self._machine):
            self._messages.notice(f"a report is in {path}")

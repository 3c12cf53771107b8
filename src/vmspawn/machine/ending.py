# SPDX-License-Identifier: LGPL-2.1-or-later
"""Describes the end of a machine, and adds it to the machine's events."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from ..host.process import Process
from ..qmp.events import Event, EventStream

#: The last event of every machine. Its data are the `reason`, `message` and `clean` of the machine's End.
MACHINE_ENDED = "MachineEnded"

#: The explanation of SIGSYS.
_SANDBOXED = "its sandbox forbids what it tried, such as starting a program (-sandbox)"

#: The `message` and `clean` of the End for values of QEMU's ShutdownCause (qapi/run-state.json).
_CAUSES = {
    "guest-shutdown": ("the guest powered off", True),
    "guest-reset": ("the guest requested a reboot, which this machine does not support", True),
    "guest-panic": ("the guest's kernel panicked", False),
    "host-qmp-quit": ("the machine was terminated", True),
    "host-signal": ("QEMU was ended by a signal", False),
    "host-ui": ("the machine was ended from QEMU's own user interface", True),
}

#: The `message` of the End for the reasons that the watcher (host/watcher.py) records before it kills QEMU.
BY_WATCHER = {
    "parent-ended": "the machine was ended: the process that started vmspawn ended",
    "program-ended": "the machine was ended: the program that started the machine ended",
}

_PANIC = "guest-panic"

#: Ends that the host requested, and that did not need the guest's cooperation.
_TERMINATED = ("host-qmp-quit", "qemu-killed")

#: The reason for the end of a machine at its time limit.
TIME_LIMIT = "time-limit"


class End(NamedTuple):
    """The end of a machine.

        end = await machine.wait()
        if not end.clean:
            print(end.message)

    `reason` is QEMU's ShutdownCause, `qemu-killed` if QEMU did not obey `quit`, `qemu-died`, `helper-died`,
    `time-limit`, `parent-ended` or `program-ended` for a machine with `die_with_parent` or `die_with_program`, or
    `unknown` for a QEMU that another manager started and that reported no cause. `message` describes the end for
    people. `clean` is True for an end that the guest or the user wanted.
    """

    reason: str
    message: str
    clean: bool

    @classmethod
    def of(cls, process: Process, cause: str, *, killed: bool, by_watcher: str, log: str) -> End:
        """Describe QEMU's end from its reported `cause` and its `log`.

        `killed` is True if this manager killed QEMU. `by_watcher` is the reason for which the watcher killed it.
        """
        if killed:
            return cls("qemu-killed", "the machine was terminated; QEMU did not obey and was killed", True)
        if by_watcher in BY_WATCHER and (process.status == -signal.SIGKILL or (process.status is None and not cause)):
            return cls(by_watcher, BY_WATCHER[by_watcher], True)
        if process.status is None and not cause:
            # Another manager started QEMU, and only QEMU's parent process gets its exit status.
            return cls("unknown", "QEMU ended without reporting a reason", False)
        if process.status not in (0, None) or not cause:
            if process.status == -signal.SIGSYS:
                return cls("qemu-died", f"QEMU {process.describe_end()}: {_SANDBOXED}", False)
            last = next((line for line in reversed(log.splitlines()) if line.strip()), "")
            return cls("qemu-died", f"QEMU {process.describe_end()}" + (f": {last}" if last else ""), False)
        message, clean = _CAUSES.get(cause, (f"the machine ended ({cause})", True))
        return cls(cause, message, clean)

    @classmethod
    def terminated(cls) -> End:
        """Return the end of a machine that was terminated before it was up."""
        return cls("host-qmp-quit", *_CAUSES["host-qmp-quit"])

    def after(self, *, panic: str, limit: float | None) -> End:
        """Return this end, changed if the guest had panicked or the time limit has passed.

        `panic` is empty without a panic. `limit` is None if there is no time limit, or it has not passed.

        A guest that powered off by itself did not panic, even if it printed the text of a panic.
        """
        if limit is not None and self.reason in _TERMINATED:
            return End(TIME_LIMIT, f"the machine was ended after {limit:g} s" + (f"; {panic}" if panic else ""), False)
        if panic and self.reason in (*_TERMINATED, "guest-reset", _PANIC):
            return End(_PANIC, panic, False)
        return self

    def event(self) -> Event:
        """Return the event of this end."""
        return Event(MACHINE_ENDED, {"reason": self.reason, "message": self.message, "clean": self.clean})


class MachineEvents:
    """The events of QEMU and vmspawn from now on, for one reader. The last one is MachineEnded.

    Iterate over the events with `async for`. Call `close` at the end, or use `with`.
    """

    def __init__(self, events: EventStream, end: Callable[[], Awaitable[End]]) -> None:
        self._events = events
        self._end: Callable[[], Awaitable[End]] | None = end

    @property
    def is_overrun(self) -> bool:
        """True if the stream has ended because the reader was so slow that events were dropped."""
        return self._events.is_overrun

    def close(self) -> None:
        """End the stream. Queued events can still be read."""
        self._end = None
        self._events.close()

    def __aiter__(self) -> MachineEvents:
        return self

    async def __anext__(self) -> Event:
        try:
            return await anext(self._events)
        except StopAsyncIteration:
            end, self._end = self._end, None
            if end is None or self.is_overrun:
                raise
        return (await end()).event()

    async def __aenter__(self) -> MachineEvents:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __enter__(self) -> MachineEvents:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Chooses the command that QEMU gets next, and the monitor that the command is sent to.

Commands are sent in the order in which they come, except that out-of-band commands go first, and a command that must
wait for another does not delay those after it. Each session has at most one in-band command in flight, so sessions take
turns. Large commands, which QEMU reads slowly, go to the bulk monitor, one at a time.

QEMU sends the events of a large command to the sessions' monitor before it replies on the bulk monitor. The client must
get these events before the reply. So the reply is held until QEMU has answered a fence: a command without an effect,
which is sent to the sessions' monitor when the reply has come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

from ..syntax.envelope import Command
from ..syntax.replies import Reply
from . import descriptors
from .upstream import Call, Upstream

#: The fence, and the fence for a monitor with out-of-band execution. QEMU replies that the command does not exist.
_FENCE = Command(b'{"execute":""')
_OOB_FENCE = Command(b'{"exec-oob":""', is_oob=True)

_CLAIM_SPARE = Command(descriptors.CLAIM_SPARE)
_CLOSE_SPARE = Command(descriptors.CLOSE_SPARE)

_Answered = Callable[[Call, Reply], None]


class Schedule:
    """The commands that wait for QEMU. Only one command with a descriptor is in flight at a time."""

    __slots__ = (
        "_bulk",
        "_bulk_turns",
        "_is_consuming",
        "_is_held",
        "_main",
        "_on_drained",
        "_oob",
        "_turns",
        "_urgent_turns",
    )

    def __init__(self, main: Upstream, bulk: Upstream | None, *, oob: bool) -> None:
        """Begin without commands. `oob` is true if the sessions' monitor supports out-of-band execution."""
        self._main = main
        self._bulk = bulk
        self._turns: deque[Call] = deque()
        self._bulk_turns: deque[Call] = deque()
        # Commands of vmspawn, which are sent before all others, and also while others are held.
        self._urgent_turns: deque[Call] = deque()
        self._is_held = False
        self._on_drained: Callable[[], None] = lambda: None
        # True while a command with a descriptor is in flight. QEMU keeps one descriptor, and gives it to the next
        # command that uses one.
        self._is_consuming = False
        self._oob = oob
        main.on_read_complete = self._on_read_complete
        if bulk is not None:
            bulk.on_read_complete = self._on_read_complete

    def hold(self, on_drained: Callable[[], None]) -> None:
        """Hold all commands except urgent ones; `on_drained` is called when QEMU has answered the sent commands."""
        self._is_held = True
        self._on_drained = on_drained
        self._check_drained()

    def release(self) -> None:
        """Send the held commands."""
        self._is_held = False
        self._on_drained = lambda: None
        self._next()
        if self._bulk is not None:
            self._next_bulk(self._bulk)

    def _on_read_complete(self) -> None:
        self._next()
        self._check_drained()

    def _check_drained(self) -> None:
        busy = self._urgent_turns or not self._main.is_idle or (self._bulk is not None and not self._bulk.is_idle)
        if self._is_held and not busy:
            self._on_drained()

    def submit(self, call: Call) -> None:
        """Send a command when its turn comes."""
        if self._is_held or self._turns or call.is_taking_descriptor or not self._main.can_take(call.command):
            self._wait(call)
        else:
            self._main.send(call)

    def _wait(self, call: Call) -> None:
        if call.command.is_oob:
            self._turns.appendleft(call)
        else:
            self._turns.append(call)
        self._next()

    def submit_large(self, call: Call) -> None:
        """Send a large command that any monitor may run."""
        if self._bulk is None:
            return self.submit(call)
        self._bulk_turns.append(call)
        self._next_bulk(self._bulk)

    def withdraw(self, call: Call) -> bool:
        """Withdraw a command; returns False if it has been sent."""
        for turns in (self._turns, self._bulk_turns):
            if call in turns:
                turns.remove(call)
                return True
        return False

    def clear(self) -> None:
        """Drop all waiting commands, after QEMU's exit."""
        self._turns.clear()
        self._urgent_turns.clear()
        self._bulk_turns.clear()

    def _may_go(self, call: Call) -> bool:
        return self._main.can_take(call.command) and not (call.is_taking_descriptor and self._is_consuming)

    def _go(self, call: Call) -> None:
        if call.is_taking_descriptor:
            self._is_consuming = True
            call.on_reply = partial(self._consumed, call.on_reply)
        self._main.send(call)

    def _next(self) -> None:
        """Send the commands that may go. A command that must wait for another does not delay those after it."""
        while self._urgent_turns and self._may_go(self._urgent_turns[0]):
            self._go(self._urgent_turns.popleft())
        turns = self._turns
        while turns and not self._is_held and not self._urgent_turns:
            if self._may_go(turns[0]):
                self._go(turns.popleft())
                continue
            call = next((call for call in turns if self._may_go(call)), None) if self._main.has_room else None
            if call is None:
                return
            turns.remove(call)
            self._go(call)

    def _urgent(self, command: Command, answered: _Answered) -> None:
        """Send a command of vmspawn before all waiting commands."""
        self._urgent_turns.append(Call(command, answered))
        self._next()

    # A failed command may have left its descriptor in QEMU. A command of another session must not get that descriptor.

    def _consumed(self, answered: _Answered, call: Call, reply: Reply) -> None:
        if call.fd >= 0 and reply.is_error:
            # Claim the descriptor under a spare name.
            return self._urgent(_CLAIM_SPARE, partial(self._reclaimed, answered, call, reply))
        self._is_consuming = False
        answered(call, reply)

    def _reclaimed(self, answered: _Answered, call: Call, reply: Reply, _: Call, claim: Reply) -> None:
        call.is_descriptor_left = not claim.is_error
        if call.is_descriptor_left:
            self._urgent(_CLOSE_SPARE, lambda _call, _reply: None)
        self._is_consuming = False
        answered(call, reply)

    # Large commands.

    def _next_bulk(self, bulk: Upstream) -> None:
        if self._bulk_turns and not bulk.in_flight and not self._is_held:
            call = self._bulk_turns.popleft()
            call.on_reply = partial(self._fence, bulk, call.on_reply)
            bulk.send(call)

    def _fence(self, bulk: Upstream, answered: _Answered, call: Call, reply: Reply) -> None:
        self._next_bulk(bulk)
        fenced = partial(self._fenced, answered, call, reply)
        if self._oob:
            self._main.send(Call(_OOB_FENCE, fenced))
        else:
            self._urgent(_FENCE, fenced)

    def _fenced(self, answered: _Answered, call: Call, reply: Reply, _call: Call, _reply: Reply) -> None:
        answered(call, reply)

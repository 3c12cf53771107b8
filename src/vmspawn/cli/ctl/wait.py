# SPDX-License-Identifier: LGPL-2.1-or-later
"""Implements `--wait` of poweroff, reboot and terminate, which reports the guest's progress."""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from typing import Any

from ...control.client import Client, VarlinkError
from ...errors import MachineEnded, NotConnected, Timeout
from ...timeouts import POWER_BUTTON_INTERVAL, REACTION_TIMEOUT, SHUTDOWN_TIMEOUT
from ..disconnect import watching
from .replies import INSTANCE, client_for, report
from .state_change import change

#: Seconds within which the manager must clean up after the end of its machine.
_CLEANUP_TIMEOUT = 15.0

_GOALS = {"poweroff": "power off", "reboot": "reboot", "terminate": "end"}

#: Messages for the events of QEMU that are reported.
_NEWS = {
    "POWERDOWN": "the power button was pressed",
    "RESET": "the machine was reset",
    "SHUTDOWN": "the guest is off",
    "GUEST_PANICKED": "the guest's kernel panicked",
    "GUEST_CRASHLOADED": "the guest's kernel panicked, and is saving a dump",
    "STOP": "the guest was paused",
    "RESUME": "the guest continues",
    "SUSPEND": "the guest was suspended",
}


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add the option to one of the three verbs."""
    parser.add_argument("--wait", action="store_true", help="wait for the operation to complete, and report progress")


def run(options: argparse.Namespace) -> None:
    """Call the method and wait. Raises Timeout, or MachineEnded if the machine ends in another way."""
    with (
        client_for(options) as events,
        client_for(options) as client,
        watching(options.machine, client.connection) as disconnect,
    ):
        events.subscribe(f"{INSTANCE}.SubscribeEvents")
        events.first_reply()
        change(options, client)
        try:
            _Wait(options, events, client).run()
        except NotConnected:
            disconnect.check()
            raise


class _Wait:
    """Waits for the goal, the machine's end or the deadline, and reports events."""

    def __init__(self, options: argparse.Namespace, events: Client, client: Client) -> None:
        self._options = options
        self._events = events
        self._client = client
        self._reported: set[str] = set()
        self._timeout = SHUTDOWN_TIMEOUT if options.timeout is None else options.timeout
        self._goal = _GOALS[options.verb]

    def run(self) -> None:
        start = time.monotonic()
        advise_at = min(REACTION_TIMEOUT, self._timeout)
        press_at = POWER_BUTTON_INTERVAL if self._options.verb == "poweroff" else math.inf
        while True:
            passed = time.monotonic() - start
            if passed >= self._timeout:
                raise Timeout(f"the guest did not {self._goal} within {self._timeout:g} s", hint=self._advice())
            if passed >= advise_at:
                advise_at = math.inf
                if not self._reacted:
                    self._say(f"the guest has not reacted yet; {self._advice()}")
            if passed >= press_at:
                press_at += POWER_BUTTON_INTERVAL
                self._press()
            event = self._events.next_reply(max(0.001, min(advise_at, press_at, self._timeout) - passed))
            if event is not None and self._handle(event):
                return

    @property
    def _reacted(self) -> bool:
        return bool(self._reported - {"POWERDOWN"})

    def _press(self) -> None:
        """Press the power button again, because firmware, or a guest that is waking up, ignores it."""
        # The events report a machine that has ended, or that cannot react in its run state.
        with contextlib.suppress(VarlinkError, NotConnected, Timeout):
            self._client.call(f"{INSTANCE}.PowerOff")

    def _handle(self, event: dict[str, Any]) -> bool:
        """Report an event. Returns whether it is the goal."""
        name, data = event["event"], event.get("data") or {}
        if name == "MachineEnded":
            self._wait_for_cleanup()
            # The machine may have been terminated because of a panic or a time limit.
            is_goal = self._options.verb == "terminate" or (self._options.verb == "poweroff" and data["clean"])
            if not is_goal:
                raise MachineEnded(data["message"])
            self._say(data["message"])
            return True
        if name in _NEWS and not (name == "POWERDOWN" and name in self._reported):
            self._reported.add(name)
            self._say(_NEWS[name])
        return bool(name == "RESET" and self._options.verb == "reboot")

    def _wait_for_cleanup(self) -> None:
        """Wait until the manager closes the connection. From then on, the machine's name is free."""
        try:
            while self._events.next_reply(_CLEANUP_TIMEOUT) is not None:
                pass
        except VarlinkError:
            self._wait_for_cleanup()
        except NotConnected:
            return

    def _advice(self) -> str:
        return f"to end the machine without asking the guest: vmctl terminate {self._options.machine}"

    def _say(self, line: str) -> None:
        report(self._options, line)

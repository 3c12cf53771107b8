# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keeps a machine's last events and its last error, for `vmctl status`."""

from __future__ import annotations

import re
import time
from collections import deque
from typing import NamedTuple

from .. import log
from ..qmp.events import Event
from ..qmp.monitor import Monitor
from ..storage.failures import FAILED_EVENT
from ..text import printable

#: The number of events that are kept. The removal of a disk causes four.
EVENTS = 16

#: The maximum length of an event in characters.
TEXT_MAX = 300

#: Ids of the ports that are plugged in for commands in the guest.
_COMMAND_PORT = re.compile(r"stream\d+")

#: The events about a device, with the name of the field that contains the device's id.
_DEVICE_FIELDS = {"VSERPORT_CHANGE": "id", "DEVICE_DELETED": "device"}


class Entry(NamedTuple):
    """An event, with its time in seconds since the epoch. The text is safe to print."""

    when: float
    text: str


def device_of(event: Event) -> str:
    """Return the id of the device that an event is about, or an empty string."""
    field = _DEVICE_FIELDS.get(event.name, "")
    return str((event.data or {}).get(field, ""))


def is_of_command(event: Event) -> bool:
    """Return whether an event is about a port that vmspawn plugged in for commands in the guest."""
    return bool(_COMMAND_PORT.fullmatch(device_of(event)))


class RecentEvents:
    """The last events of QEMU and vmspawn, as the machine's monitor reports them.

    Events of ports for commands are left out: each command causes several.
    """

    def __init__(self, monitor: Monitor) -> None:
        #: The last events, the oldest first.
        self.events: deque[Entry] = deque(maxlen=EVENTS)
        #: The last failure, or None.
        self.last_error: Entry | None = None
        monitor.witness(self._see)

    def _see(self, event: Event) -> None:
        if is_of_command(event):
            return
        words = [
            f"{name}={value}" for name, value in (event.data or {}).items() if isinstance(value, str | int) and value
        ]
        text = printable(" ".join([event.name, *words]))[:TEXT_MAX]
        self.events.append(Entry(time.time(), text))
        log.debug(f"event {text}")
        if event.name == FAILED_EVENT:
            self.failed(f"disk {text.removeprefix(event.name).strip()}")

    def failed(self, what: str) -> None:
        """Record a failure."""
        self.last_error = Entry(time.time(), what)
        log.debug(f"failed: {what}")

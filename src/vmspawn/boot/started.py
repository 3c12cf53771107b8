# SPDX-License-Identifier: LGPL-2.1-or-later
"""Holds a running QEMU and the objects that its manager needs, as the result of `launch` and `adopt`."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from ..aio.sockets import listen
from ..helpers.helper import Helper
from ..host import runtime
from ..host.consolelog import ConsoleLog
from ..host.descriptor import Descriptor
from ..host.runtime import MachineDirectory
from ..host.spawn import kill_child
from ..hotplug.places import Layout
from ..record import Record
from .boot_disk import BootDisk
from .config import MachineConfig
from .qemu import QemuBinary
from .state import Fork, SavedLoading, State

#: Clients of the console that the kernel queues while the manager is busy.
_CLIENTS_BACKLOG = 64


class Incoming(Record):
    """A saved state: its URI in QEMU, whether the guest ran, and the console's earlier output.

    `new_identity` is True if the guest gets its own host name, machine ID and MAC addresses. `has_ram_file` is True if
    the memory is in a file, and not in the state.
    """

    uri: str
    was_running: bool
    shown: bytes = b""
    new_identity: bool = False
    has_ram_file: bool = False

    @property
    def record(self) -> SavedLoading:
        """The record for state.json, by which another manager can finish the load."""
        return SavedLoading(self.uri, self.was_running, self.has_ram_file)


class Launched(Record):
    """The origin of a QEMU that this process launched, and which is its child."""

    disks: tuple[BootDisk, ...]
    #: True if BIOS boots the image; False if UEFI boots the image, or QEMU boots a kernel.
    is_bios_boot: bool = False
    #: The saved state that QEMU loads; None if the machine boots.
    incoming: Incoming | None = None
    #: Sections of the journal of the machine that this is a copy of.
    attachments: Mapping[str, Mapping[str, Any]] = {}


class Adopted(Record):
    """The origin of a QEMU that another manager launched, with the state that the other manager wrote last."""

    state: State


class Monitors(Record):
    """The manager's connections to QEMU's monitors."""

    manager: socket.socket
    sessions: socket.socket
    bulk: socket.socket


class SharedConsole(Record):
    """The manager's end of the console: its pipes, the socket that viewers connect to, and QEMU's log."""

    typed: Descriptor
    shown: Descriptor
    listener: socket.socket
    log: ConsoleLog | None

    def close(self) -> None:
        """Close the pipes, the socket and the log. May be called again."""
        for each in (self.typed, self.shown, self.listener):
            each.close()
        if self.log is not None:
            self.log.close()


class Started(Record):
    """A running QEMU. Owns everything below; an object that takes over a part of it closes that part.

    `console` is None if the console is QEMU's own (`native`). `transcript` is the file that the console is appended to.
    `watcher` is the process that ends the machine if this program dies, or 0.
    """

    origin: Launched | Adopted
    config: MachineConfig
    binary: QemuBinary
    accelerator: str
    layout: Layout
    directory: MachineDirectory
    pid: int
    monitors: Monitors
    size_port: socket.socket | None
    console: SharedConsole | None
    transcript: Descriptor | None
    helpers: tuple[Helper, ...]
    #: The snapshot, if the machine is a copy.
    fork: Fork | None = None
    watcher: int = 0

    def leave(self) -> None:
        """Disconnect from QEMU and its helpers, which continue for another manager. May be called again."""
        self._close()
        for helper in self.helpers:
            helper.leave()
        self.directory.close()

    def end(self) -> None:
        """Kill QEMU if it is a child and still runs, end the helpers, and remove the directory. May be called again.

        A QEMU that was adopted must have ended.
        """
        kill_child(self.pid)
        self._close()
        for helper in self.helpers:
            helper.close()
        self.directory.remove()
        if self.watcher:
            kill_child(self.watcher)

    def give_up(self) -> None:
        """Undo a start that failed: end a QEMU that was launched, leave one that was adopted."""
        if isinstance(self.origin, Launched):
            self.end()
        else:
            self.leave()

    def _close(self) -> None:
        for connection in (*self.monitors, self.size_port, self.console, self.transcript):
            if connection is not None:
                connection.close()


def connect_monitors(directory: MachineDirectory, undo: ExitStack) -> Monitors:
    """Connect to QEMU's monitors. Raises OSError."""
    return Monitors(*(connect(directory, name, undo) for name in runtime.MONITORS))


def connect(directory: MachineDirectory, name: str, undo: ExitStack) -> socket.socket:
    """Connect to one of QEMU's sockets. Raises OSError, at once if the socket's queue is full."""
    connected = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    connected.setblocking(False)
    connected.connect(directory.socket_address(name))
    return connected


def share_console(
    directory: MachineDirectory, pipes: tuple[int, int], log: ConsoleLog | None, undo: ExitStack
) -> SharedConsole:
    """Listen for viewers of a console. `pipes` are the manager's ends for input and for output.

    Owns `pipes` and `log` from the call on. Raises OSError.
    """
    typed, shown = map(Descriptor, pipes)
    undo.callback(typed.close)
    undo.callback(shown.close)
    if log is not None:
        undo.callback(log.close)
    listener = undo.enter_context(listen(directory.socket_address(runtime.CONSOLE), _CLIENTS_BACKLOG))
    return SharedConsole(typed, shown, listener, log)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Accepts a limited number of clients on the control socket, and serves their calls."""

import asyncio
import errno
import socket
from collections.abc import Callable

from asyncvarlink import VarlinkInterfaceRegistry
from asyncvarlink.serviceinterface import VarlinkServiceInterface

from ..aio.sockets import is_allowed
from ..host.runtime import MachineDirectory
from ..inside.inside import Inside
from ..machine.running import Running
from ..version import VERSION
from .connection import Connection
from .interfaces import Machine, MachineInstance, QemuMachineInstance, VirtualMachineInstance

#: The maximum number of connections. To admit another client, the connection that was idle the longest is closed.
CONNECTIONS_MAX = 256

#: Connections that are accepted before the event loop serves other work.
_ACCEPT_BATCH = 32

#: Seconds to pause accepting after the process has run out of descriptors.
_ACCEPT_PAUSE = 0.5


def build_registry(machine: Running, inside: Inside) -> VarlinkInterfaceRegistry:
    """Return the interfaces that a machine's control socket serves."""
    registry = VarlinkInterfaceRegistry()
    registry.register_interface(VarlinkServiceInterface("vmspawn", "vmspawn", VERSION, "", registry, comments=True))
    registry.register_interface(MachineInstance(machine))
    registry.register_interface(VirtualMachineInstance())
    registry.register_interface(QemuMachineInstance(machine))
    registry.register_interface(Machine(machine, inside))
    return registry


class ControlServer:
    """The listening socket and its connections. `close` ends them; the runtime directory removes the socket file."""

    def __init__(
        self,
        directory: MachineDirectory,
        registry: VarlinkInterfaceRegistry,
        *,
        on_failed: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Start to serve. `on_failed` is called with a description of each call that fails."""
        self._on_failed = on_failed
        self._registry = registry
        self._connections: set[Connection] = set()
        self._loop = asyncio.get_running_loop()
        self._listener = directory.take_listener()
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener, self._accept)

    async def finish(self, *, timeout: float) -> None:
        """Stop listening, and wait as `answered` does."""
        self._stop_listening()
        await self.answered(timeout=timeout)

    async def answered(self, *, timeout: float) -> None:
        """Wait up to `timeout` seconds for the last replies to pending calls."""
        calls = [call for each in self._connections if (call := each.call) is not None]
        if calls:
            await asyncio.wait(calls, timeout=max(0.0, timeout))

    def _stop_listening(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener)
            self._listener.close()

    def close(self) -> None:
        """Stop listening and end every connection."""
        self._stop_listening()
        for connection in tuple(self._connections):
            connection.close()

    def _accept(self) -> None:
        for _turn in range(_ACCEPT_BATCH):
            try:
                client, _ = self._listener.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._pause()
                return
            self._admit(client)

    def _admit(self, client: socket.socket) -> None:
        if not is_allowed(client):
            client.close()
            return
        if len(self._connections) >= CONNECTIONS_MAX:
            self._make_room()
        self._connections.add(Connection(client, self._registry, self._connections.discard, on_failed=self._on_failed))

    def _make_room(self) -> None:
        idle = [each for each in self._connections if not each.is_busy] or list(self._connections)
        min(idle, key=lambda each: each.last_active).close()

    def _pause(self) -> None:
        """Pause accepting while the process is out of descriptors. New clients wait in the backlog."""
        self._loop.remove_reader(self._listener)
        self._loop.call_later(_ACCEPT_PAUSE, self._resume)

    def _resume(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._accept)

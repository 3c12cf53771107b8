# SPDX-License-Identifier: LGPL-2.1-or-later
"""Explains why a machine closed a connection: the machine ended, its manager ended, or it disconnected the client."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Iterator

from ..aio.sockets import peer_process
from ..errors import NotConnected
from ..host.runtime import running_qemu, runtime_root

#: Seconds within which a process must exit after it closed its socket.
_END_TIMEOUT = 5.0


class Disconnect:
    """Explains why a connection was closed: which process ended. Made by `watching` while the connection is open."""

    def __init__(self, machine: str, manager: int) -> None:
        """Watch QEMU and the manager until `close`. `manager` is a process id, or 0 if unknown."""
        self._machine = machine
        #: Pidfds, or -1 for a process that has ended or is unknown.
        self._qemu = self._find_qemu()
        self._manager = _open(manager)

    def _find_qemu(self) -> int:
        return _open(running_qemu(os.path.join(runtime_root(), self._machine)))

    def close(self) -> None:
        """Stop watching."""
        for fd in (self._qemu, self._manager):
            if fd >= 0:
                os.close(fd)

    def check(self) -> None:
        """Raise NotConnected for a closed connection, with the reason and a hint, unless the machine has ended."""
        if self._qemu < 0:
            # The machine may have been starting when the connection was made.
            self._qemu = self._find_qemu()
        if self._qemu < 0:
            return  # the machine has ended, or another program runs it, whose QEMU is unknown
        ended = self._ended()
        if self._qemu in ended:
            return
        if self._manager in ended:
            raise NotConnected(
                f"the manager of machine {self._machine} has ended; the machine continues",
                hint=f"adopt it with: vmctl adopt {self._machine}",
            )
        raise NotConnected(
            f"machine {self._machine} closed the connection",
            hint="too many clients are connected, or this one read too slowly",
        )

    def _ended(self) -> set[int]:
        """Return the pidfds of ended processes. A manager without a pidfd, -1, counts as ended.

        Waits for a process to end, because a process closes its sockets before it exits.
        """
        poll = select.poll()
        poll.register(self._qemu, select.POLLIN)
        if self._manager < 0:
            return {self._manager, *(fd for fd, _ in poll.poll(0))}
        poll.register(self._manager, select.POLLIN)
        return {fd for fd, _ in poll.poll(int(_END_TIMEOUT * 1000))}


@contextlib.contextmanager
def watching(machine: str, connected: socket.socket) -> Iterator[Disconnect]:
    """Watch QEMU and the manager behind a connection, to explain why the connection is closed."""
    with contextlib.closing(Disconnect(machine, peer_process(connected)[0])) as disconnect:
        yield disconnect


def _open(pid: int) -> int:
    """Return a pidfd, or -1 if the process does not exist."""
    try:
        return os.pidfd_open(pid) if pid > 0 else -1
    except OSError:
        return -1

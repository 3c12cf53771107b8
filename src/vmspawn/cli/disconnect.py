# SPDX-License-Identifier: LGPL-2.1-or-later
"""What became of a machine that has closed a connection: it has ended, its manager has, or it has let one client go."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Iterator

from ..aio.sockets import peer_process
from ..errors import NotConnected
from ..host.runtime import running_qemu, runtime_root

#: Seconds for a process whose socket is closed to be gone.
_END_TIMEOUT = 5.0


class Parting:
    """Knows the two processes behind a connection, QEMU and its manager; `watching` makes it while both live."""

    def __init__(self, machine: str, qemu: int, manager: int) -> None:
        """Both are pidfds, or -1, and stay the caller's."""
        self._machine = machine
        self._qemu = qemu
        self._manager = manager

    def check(self) -> None:
        """The connection has ended: raise NotConnected, with what can be done, unless the machine has ended too."""
        if self._qemu < 0:
            return  # one that is not ours, of whose end nothing is known
        ended = self._ended()
        if self._qemu in ended:
            return
        if self._manager in ended:
            raise NotConnected(
                f"the manager of machine {self._machine} is gone; the machine runs on",
                hint=f"adopt it with: vmctl adopt {self._machine}",
            )
        raise NotConnected(
            f"machine {self._machine} has closed the connection",
            hint="too many are connected, or what it sent was not read",
        )

    def _ended(self) -> set[int]:
        """Those that have ended; waits for one to do so, for it closes its sockets a little earlier."""
        poll = select.poll()
        poll.register(self._qemu, select.POLLIN)
        if self._manager < 0:
            return {self._manager, *(fd for fd, _ in poll.poll(0))}
        poll.register(self._manager, select.POLLIN)
        return {fd for fd, _ in poll.poll(int(_END_TIMEOUT * 1000))}


@contextlib.contextmanager
def watching(machine: str, connected: socket.socket) -> Iterator[Parting]:
    """Take note of the processes behind a connection to a machine, before it ends."""
    manager = _open(peer_process(connected)[0])
    qemu = _open(running_qemu(os.path.join(runtime_root(), machine)))
    try:
        yield Parting(machine, qemu, manager)
    finally:
        for fd in (qemu, manager):
            if fd >= 0:
                os.close(fd)


def _open(pid: int) -> int:
    """A pidfd, or -1 if there is no such process."""
    try:
        return os.pidfd_open(pid) if pid > 0 else -1
    except OSError:
        return -1

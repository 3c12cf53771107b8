# SPDX-License-Identifier: LGPL-2.1-or-later
"""Describes the process at the other end of a session's socket."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from ...aio.sockets import peer_process


@dataclass(frozen=True, slots=True)
class Peer:
    """A process at the time when it connected."""

    pid: int
    uid: int
    #: The name from /proc/PID/comm (proc(5)), or empty if the process has exited.
    comm: str

    @classmethod
    def of(cls, connected: socket.socket) -> Peer:
        """Return the process that connected a unix socket. For other sockets, see `peer_process`."""
        pid, uid = peer_process(connected)
        try:
            with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
                comm = file.read().rstrip("\n")
        except OSError:
            comm = ""
        return cls(pid, uid, comm)

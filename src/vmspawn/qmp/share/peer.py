# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who is at the other end of a unix socket."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from pathlib import Path

_CREDENTIALS = struct.Struct("iII")


@dataclass(frozen=True, slots=True)
class Peer:
    """A process that connected, as the kernel knew it then."""

    pid: int
    uid: int
    #: Its name as in proc(5), `comm`; empty if it has exited.
    comm: str

    @classmethod
    def of(cls, connected: socket.socket) -> Peer:
        """The process that connected a socket (unix(7), SO_PEERCRED). Raises OSError if it is no unix socket."""
        data = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, _ = _CREDENTIALS.unpack(data)
        try:
            comm = Path(f"/proc/{pid}/comm").read_text(errors="replace").rstrip("\n")
        except OSError:
            comm = ""
        return cls(pid, uid, comm)

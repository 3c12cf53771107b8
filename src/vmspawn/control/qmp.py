# SPDX-License-Identifier: LGPL-2.1-or-later
"""Opens QMP sessions for Varlink clients, and lists the sessions.

Names are in Varlink's case because they are part of the protocol.
"""

import contextlib
import socket
import typing

from asyncvarlink import FileDescriptor

from ..errors import VmspawnError
from ..machine.running import Running
from .connection import CALLER
from .types import varlink_type
from .upgrade import Taker

if typing.TYPE_CHECKING:
    from ..qmp.share.session import Session as QmpSession

# asyncvarlink evaluates annotations, so this module cannot use `from __future__ import annotations`.


class Acquired(typing.TypedDict):
    """The reply to AcquireQMP. The reply has no descriptor if the session is on the Varlink connection itself."""

    fileDescriptorIndex: FileDescriptor | None


# The QMP server is imported for the first client, because many machines never have one.


async def acquire(machine: Running, *, read_only: bool) -> Acquired:
    """Open a QMP session on one end of a socket pair, and return the other end.

    The session outlives the Varlink connection.
    """
    from ..qmp.share.peer import Peer

    multiplexer = await machine.multiplexer()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    with theirs:
        multiplexer.open(ours, read_only=read_only, peer=Peer.of(CALLER.get()))
        return {"fileDescriptorIndex": FileDescriptor(theirs.detach(), should_close=True)}


async def take_over(machine: Running, *, read_only: bool) -> Taker:
    """Return a function that opens a QMP session on the Varlink connection itself."""
    from ..qmp.share.peer import Peer

    multiplexer = await machine.multiplexer()

    def take(connected: socket.socket) -> None:
        # QEMU may have ended during the reply; the client then gets end of file.
        with contextlib.suppress(VmspawnError):
            multiplexer.open(connected, read_only=read_only, peer=Peer.of(connected))

    return take


@varlink_type
class Session:
    """A QMP client. Bytes, commands and events are totals since it connected; `queued` commands wait for QEMU."""

    processId: int | None
    userId: int | None
    command: str | None
    readOnly: bool
    commands: int
    events: int
    bytesIn: int
    bytesOut: int
    queued: int


def describe(session: "QmpSession") -> Session:
    """Describe a session for a Varlink client."""
    peer = session.peer
    return Session(
        processId=peer.pid if peer else None,
        userId=peer.uid if peer else None,
        command=peer.comm if peer else None,
        readOnly=session.read_only,
        commands=session.commands,
        events=session.events,
        bytesIn=session.bytes_in,
        bytesOut=session.bytes_out,
        queued=session.queued,
    )

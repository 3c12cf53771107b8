# SPDX-License-Identifier: LGPL-2.1-or-later
"""QMP for the clients of Varlink: connections of their own, handed out, and the list of those that there are.

Varlink's names are part of the protocol, hence their case here.
"""

import contextlib
import socket
import typing
from dataclasses import dataclass

from asyncvarlink import FileDescriptor

from ..errors import VmspawnError
from ..machine.running import Running
from .connection import CALLER
from .upgrade import Taker

if typing.TYPE_CHECKING:
    from ..qmp.share.session import Session as QmpSession

# asyncvarlink reads annotations as types, so they cannot be names in strings here.


class Acquired(typing.TypedDict):
    """The reply to AcquireQMP: a connection, unless it is the one that the call came by."""

    fileDescriptorIndex: FileDescriptor | None


# What serves QMP is loaded with the first client that asks for it, for many machines never have one.


async def acquire(machine: Running, *, read_only: bool) -> Acquired:
    """A QMP session on a socket pair; the other end goes to the caller and outlives the Varlink connection."""
    from ..qmp.share.peer import Peer

    multiplexer = await machine.multiplexer()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    with theirs:
        multiplexer.open(ours, read_only=read_only, peer=Peer.of(CALLER.get()))
        return {"fileDescriptorIndex": FileDescriptor(theirs.detach(), should_close=True)}


async def take_over(machine: Running, *, read_only: bool) -> Taker:
    """A QMP session on the Varlink connection itself."""
    from ..qmp.share.peer import Peer

    multiplexer = await machine.multiplexer()

    def take(connected: socket.socket) -> None:
        # QEMU may have gone while the reply left; the client sees the end of the stream then.
        with contextlib.suppress(VmspawnError):
            multiplexer.open(connected, read_only=read_only, peer=Peer.of(connected))

    return take


@dataclass(frozen=True, slots=True)
class Session:
    """A QMP client. Bytes, commands and events count from when it connected; `queued` commands wait for QEMU."""

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
    """A session for a client."""
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

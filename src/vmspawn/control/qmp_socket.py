# SPDX-License-Identifier: LGPL-2.1-or-later
"""Serves a machine's QMP sessions on a socket with a path, for programs that cannot use a descriptor."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable

from ..aio import sockets
from ..aio.tasks import Tasks
from ..errors import VmspawnError
from ..machine.ending import MACHINE_ENDED
from . import calls
from .share import listening

_RECEIVE_SIZE = 65536

#: The maximum number of file descriptors in a message; QEMU takes no more.
_FDS_MAX = 16


async def serve_sessions(machine: str, listen: str, *, read_only: bool, on_ready: Callable[[], None]) -> None:
    """Create the socket `listen`, and give each client a QMP session.

    Returns when the machine ends, or on SIGINT or SIGTERM, and removes `listen`. Raises NotConnected if the machine
    does not run or its manager ends, and StartError if `listen` cannot be created.
    """
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    tasks = Tasks()
    async with calls.opened(machine) as connection:
        subscription = {
            "method": "io.systemd.MachineInstance.SubscribeEvents",
            "parameters": {"filter": [MACHINE_ENDED]},
        }
        await connection.send({**subscription, "more": True})
        await connection.receive()
        with listening(listen) as listener:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, ended.set)
            loop.add_reader(listener, _accept, listener, tasks, machine, read_only)
            on_ready()
            await _until(ended, connection)
            loop.remove_reader(listener)
    tasks.cancel()


async def _until(ended: asyncio.Event, connection: calls.Connection) -> None:
    """Wait for a signal, or for the machine's last event. Raises NotConnected if the manager ends."""
    waiting = asyncio.create_task(ended.wait())
    receiving = asyncio.create_task(connection.receive())
    try:
        await asyncio.wait({waiting, receiving}, return_when=asyncio.FIRST_COMPLETED)
        if receiving.done():
            receiving.result()
    finally:
        waiting.cancel()
        receiving.cancel()


def _accept(listener: socket.socket, tasks: Tasks, machine: str, read_only: bool) -> None:
    try:
        client, _ = listener.accept()
    except OSError:
        return
    if sockets.is_allowed(client):
        tasks.start(_serve(client, machine, read_only))
    else:
        client.close()


async def _serve(client: socket.socket, machine: str, read_only: bool) -> None:
    """Relay between a client and a new session until the session has sent everything. Owns the client's socket."""
    with client:
        try:
            reply = await calls.call(machine, "io.vmspawn.Machine.AcquireQMP", {"readOnly": read_only})
        except VmspawnError:
            return  # closing the connection informs the client
        with socket.socket(fileno=reply.fds[0]) as session:
            for each in (client, session):
                each.setblocking(False)
            ways = [asyncio.create_task(_relay(client, session)), asyncio.create_task(_relay(session, client))]
            try:
                # A client that has shut down its writing side still reads, so wait for the session's output.
                await asyncio.wait(ways[1:])
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.wait(ways)


async def _relay(source: socket.socket, target: socket.socket) -> None:
    """Relay bytes and file descriptors until the source ends."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError):
        while True:
            await _ready(source, loop.add_reader, loop.remove_reader)
            data, fds, _, _ = socket.recv_fds(source, _RECEIVE_SIZE, _FDS_MAX)
            try:
                await _pass_on(target, data, fds)
            finally:
                for fd in fds:
                    os.close(fd)
            if not data:
                target.shutdown(socket.SHUT_WR)
                return


async def _pass_on(target: socket.socket, data: bytes, fds: list[int]) -> None:
    """Send data, and the descriptors with its first byte."""
    loop = asyncio.get_running_loop()
    while fds and data:
        try:
            data = data[socket.send_fds(target, [data], fds) :]
        except BlockingIOError:
            await _ready(target, loop.add_writer, loop.remove_writer)
        else:
            break
    await loop.sock_sendall(target, data)


async def _ready(connected: socket.socket, add: Callable[..., None], remove: Callable[[socket.socket], object]) -> None:
    """Wait until a socket is readable or writable."""
    is_ready = asyncio.Event()
    add(connected, is_ready.set)
    try:
        await is_ready.wait()
    finally:
        remove(connected)

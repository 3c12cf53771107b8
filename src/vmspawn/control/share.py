# SPDX-License-Identifier: LGPL-2.1-or-later
"""Shares the QMP socket of a QEMU that another program started: one monitor, any number of sessions."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator

from ..aio import sockets
from ..aio.threads import open_in_thread
from ..errors import NotConnected, StartError, Timeout, VmspawnError
from ..qmp.limits import GREETING_TIMEOUT
from ..qmp.share.multiplexer import Multiplexer
from ..qmp.share.peer import Peer

#: Connections that the kernel queues while the process is busy.
_BACKLOG = 128


async def share_socket(
    source: str, listen: str, *, on_ready: Callable[[], None], timeout: float = GREETING_TIMEOUT
) -> None:
    """Connect to QEMU's monitor at the socket `source`, and serve sessions on a new socket `listen`.

    Returns on SIGINT or SIGTERM, and removes `listen`. `on_ready` is called when clients can connect. Raises
    NotConnected if QEMU does not run or ends, Timeout if the monitor sends no greeting within `timeout` seconds because
    another program uses it, and StartError if `listen` cannot be created.
    """
    loop = asyncio.get_running_loop()
    lost: list[str] = []
    ended = asyncio.Event()

    def on_lost(why: str) -> None:
        lost.append(why)
        ended.set()

    multiplexer: Multiplexer | None = None
    connected = await open_in_thread(lambda: _connect(source, timeout), socket.socket.close)
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    try:
        multiplexer = await Multiplexer.connect(connected, on_lost=on_lost, timeout=timeout)
        with listening(listen) as listener:
            loop.add_reader(listener, _accept, listener, multiplexer)
            on_ready()
            await ended.wait()
            loop.remove_reader(listener)
        if lost:
            raise NotConnected(f"{lost[0]} ({source})")
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        if multiplexer is not None:
            await multiplexer.close()


def _connect(source: str, timeout: float) -> socket.socket:
    try:
        return sockets.connect(source, timeout=timeout)
    except TimeoutError as error:
        raise Timeout(f"{source} {error.strerror}", hint="another program uses it") from None
    except OSError as error:
        raise NotConnected(f"cannot connect to {source}: {error.strerror or error}") from None


@contextlib.contextmanager
def listening(path: str) -> Iterator[socket.socket]:
    """Listen on a new socket at `path`, and remove its file on exit. Raises StartError."""
    try:
        listener = sockets.listen(path, _BACKLOG)
    except OSError as error:
        hint = "choose another path, or remove that file" if os.path.exists(path) else ""
        raise StartError(f"cannot listen on {path}: {error.strerror or error}", hint=hint) from None
    listener.setblocking(False)
    try:
        yield listener
    finally:
        listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _accept(listener: socket.socket, multiplexer: Multiplexer) -> None:
    try:
        client, _ = listener.accept()
    except OSError:
        return
    if not sockets.is_allowed(client):
        client.close()
        return
    with contextlib.suppress(VmspawnError):
        multiplexer.open(client, peer=Peer.of(client))

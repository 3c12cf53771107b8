# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest's console, copied to a descriptor of ours: what `--console=read-only` shows."""

import asyncio
import os
import select
import socket

# A pipe that polls as writable takes this much without blocking (pipe(7), PIPE_BUF).
_CHUNK = select.PIPE_BUF


class ConsoleOutput:
    """Copies a socket to a descriptor at the pace of whoever reads that. Owns the socket, not the descriptor."""

    def __init__(self, source: socket.socket, target: int) -> None:
        source.setblocking(False)
        self._source = source
        self._target = target
        self._loop = asyncio.get_running_loop()
        self._waiting = False
        self._poll = select.poll()
        self._poll.register(target, select.POLLOUT)
        #: Set when the source has ended and everything is written, or nobody wants it any more.
        self.ended = asyncio.Event()
        self._loop.add_reader(source, self._copy)

    def close(self) -> None:
        """Stop copying."""
        if self.ended.is_set():
            return
        self._loop.remove_reader(self._source)
        if self._waiting:
            self._loop.remove_writer(self._target)
        self._source.close()
        self.ended.set()

    def _copy(self) -> None:
        if not self._poll.poll(0):
            self._wait_for_target()
            return
        try:
            data = self._source.recv(_CHUNK)
            written = os.write(self._target, data) if data else 0
            while written < len(data):
                written += os.write(self._target, data[written:])
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()

    def _wait_for_target(self) -> None:
        self._loop.remove_reader(self._source)
        self._waiting = True
        self._loop.add_writer(self._target, self._resume)

    def _resume(self) -> None:
        self._waiting = False
        self._loop.remove_writer(self._target)
        self._loop.add_reader(self._source, self._copy)

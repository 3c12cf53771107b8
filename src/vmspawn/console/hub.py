# SPDX-License-Identifier: LGPL-2.1-or-later
"""Shares the guest's console: shows its output to all viewers, and passes their input to the guest.

A viewer first gets the last 64 KiB of output, and at least all earlier output that the manager started with: what the
guest printed without a manager, or before the snapshot of a warm start.
A slow viewer slows the console down for all viewers, as a slow terminal does, and each viewer decides how long to wait
for its reader. So memory is bounded, and no output is dropped.
"""

from __future__ import annotations

import asyncio
import functools
import os
import socket
from collections.abc import Callable
from typing import Protocol

from ..aio.sockets import is_allowed
from ..aio.writer import Writer
from .client import ConsoleClient
from .unread import Log

#: Bytes of past output that a new viewer gets first.
REPLAY_MAX = 64 * 1024

#: When this many bytes of input are queued for the guest, senders that can wait are paused.
INPUT_MAX = 64 * 1024

#: The maximum number of clients. Each costs a write for every piece of output.
CLIENTS_MAX = 64

_RECEIVE_SIZE = 65536

#: Seconds to pause after a read of less than a page. A serial port sends single bytes; waking up for each would take
#: the processor from QEMU. The pipe buffers the bytes meanwhile, and five milliseconds are not visible.
_GATHER = 0.005
_FEW = 4096


class Viewer(Protocol):
    """A viewer of the console."""

    @property
    def is_full(self) -> bool:
        """True while the viewer cannot take more output. It then calls `Console.viewer_has_room` when it has room."""

    def show(self, data: bytes) -> None:
        """Show output."""

    def finish(self) -> bool:
        """Return whether all output has been shown; if not, show the rest, and then detach.

        Called after the last `show`.
        """


class Console:
    """One machine's console. Owns `typed`, `source`, `listener` and `log`.

    Input is written to the non-blocking pipe `typed`, output is read from the non-blocking pipe `source`, and clients
    connect to `listener`. `log` is QEMU's log of the console, which is emptied after each read. `unread` is earlier
    output: the guest printed it while it had no manager, or before the snapshot of a warm start.
    """

    def __init__(
        self, typed: int, source: int, listener: socket.socket, log: Log | None = None, unread: bytes = b""
    ) -> None:
        listener.setblocking(False)
        self._typed = typed
        # QEMU's output, or -1 after QEMU has closed it.
        self._source = source
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._viewers: list[Viewer] = []
        self._clients: set[ConsoleClient] = set()
        self._log = log
        self._replay = bytearray(unread)
        self._replay_max = max(REPLAY_MAX, len(unread))
        self._input = Writer(typed, functools.partial(os.write, typed), on_empty=self._on_input_empty)
        self._waiting_for_room: list[Callable[[], None]] = []
        self._is_reading = False
        #: Set when all output of QEMU has been read.
        self.drained = asyncio.Event()
        #: Set when QEMU has closed its end, and each viewer has shown all output or detached.
        self.ended = asyncio.Event()
        self._resume()
        self._loop.add_reader(listener, self._accept)

    # Viewers.

    def attach(self, viewer: Viewer) -> None:
        """Show a viewer the console's last output, then all new output."""
        self._viewers.append(viewer)
        if self._replay:
            viewer.show(bytes(self._replay[-self._replay_max :]))
        if self._source < 0:
            self._finish_viewer(viewer)

    def detach(self, viewer: Viewer) -> None:
        """Stop showing the console to a viewer. Does nothing if it is not attached."""
        if viewer in self._viewers:
            self._viewers.remove(viewer)
        if self._source < 0 and not self._viewers:
            self.ended.set()
        self.viewer_has_room()

    def viewer_has_room(self) -> None:
        """Continue to read, now that a full viewer has room again."""
        if self._source >= 0 and not any(viewer.is_full for viewer in self._viewers):
            self._resume()

    # Input.

    @property
    def input_pending(self) -> int:
        """The number of bytes of input that the guest has not taken yet."""
        return self._input.pending

    def type(self, data: bytes) -> None:
        """Send input to the guest. It is queued until the guest takes it."""
        if self._source >= 0:
            self._input.write(data)

    def when_input_has_room(self, callback: Callable[[], None]) -> None:
        """Call `callback` at once if less than INPUT_MAX is queued for the guest, else when the queue is empty."""
        if self._input.pending < INPUT_MAX:
            callback()
        else:
            self._waiting_for_room.append(callback)

    def _on_input_empty(self) -> None:
        waiting, self._waiting_for_room = self._waiting_for_room, []
        for callback in waiting:
            callback()

    # Output.

    def _resume(self) -> None:
        if not self._is_reading and self._source >= 0:
            self._is_reading = True
            self._loop.add_reader(self._source, self._readable)

    def _pause(self) -> None:
        if self._is_reading and self._source >= 0:
            self._is_reading = False
            self._loop.remove_reader(self._source)

    def _readable(self) -> None:
        try:
            data = os.read(self._source, _RECEIVE_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._finish()
            return
        self._replay += data
        if len(self._replay) > 2 * self._replay_max:
            del self._replay[: -self._replay_max]
        if self._log is not None:
            self._log.empty()
        for viewer in tuple(self._viewers):
            viewer.show(data)
        if any(viewer.is_full for viewer in self._viewers):
            self._pause()
        elif len(data) < _FEW:
            self._pause()
            self._loop.call_later(_GATHER, self.viewer_has_room)

    def _finish(self) -> None:
        """Close the console after QEMU has ended. The viewers show the rest of the output."""
        self._close_sockets()
        for viewer in tuple(self._viewers):
            self._finish_viewer(viewer)
        if not self._viewers:
            self.ended.set()

    def _finish_viewer(self, viewer: Viewer) -> None:
        if viewer.finish():
            self.detach(viewer)

    # Clients.

    def _accept(self) -> None:
        try:
            connected, _ = self._listener.accept()
        except OSError:
            return
        if len(self._clients) >= CLIENTS_MAX or not is_allowed(connected):
            connected.close()
            return
        client = ConsoleClient(
            connected, on_input=self._on_client_input, on_room=self.viewer_has_room, on_closed=self._on_client_closed
        )
        self._clients.add(client)
        self.attach(client)

    def _on_client_input(self, data: bytes, go_on: Callable[[], None]) -> None:
        self.type(data)
        self.when_input_has_room(go_on)

    def _on_client_closed(self, client: ConsoleClient) -> None:
        self._clients.discard(client)
        self.detach(client)

    def close(self) -> None:
        """Detach every viewer and close the sockets."""
        self._close_sockets()
        for client in tuple(self._clients):
            client.close()
        for viewer in tuple(self._viewers):
            viewer.finish()
        self._viewers.clear()
        self.ended.set()

    def _close_sockets(self) -> None:
        self._pause()
        self.drained.set()
        self._input.close()
        self._waiting_for_room.clear()
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener)
            self._listener.close()
        if self._source >= 0:
            os.close(self._source)
            os.close(self._typed)
            self._source = -1
            if self._log is not None:
                self._log.close()

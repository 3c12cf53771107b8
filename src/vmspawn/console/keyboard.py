# SPDX-License-Identifier: LGPL-2.1-or-later
"""Passes input from a terminal or a pipe to the guest's console."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from .hotkeys import Hotkeys, Key
from .streams import Input

if TYPE_CHECKING:
    from .hub import Console

#: Bytes typed on a terminal that may wait for the guest. Input beyond this is dropped: reading must continue, because
#: vmspawn's key sequences come from the same terminal.
TYPED_MAX = 1024 * 1024


class Keyboard:
    """Passes the input of a descriptor to the console. The caller keeps the descriptor.

    On a terminal, key sequences go to `on_key` instead. `on_gone` is called once when the terminal hangs up, and
    `on_overflow` once when input is dropped. Input from other files is passed unchanged, at the guest's pace.
    """

    def __init__(
        self,
        console: Console,
        fd: int,
        *,
        terminal: bool,
        on_key: Callable[[Key], None],
        on_gone: Callable[[], None],
        on_overflow: Callable[[], None],
    ) -> None:
        self._console = console
        self._input = Input(fd)
        self._on_key = on_key
        self._on_gone = on_gone
        self._on_overflow = on_overflow
        self._hotkeys = Hotkeys() if terminal else None
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._is_pollable = True
        self._has_overflowed = False
        self._resume()

    def close(self) -> None:
        """Stop reading. May be called again."""
        if self._input.fd < 0:
            return
        if self._is_pollable:
            self._loop.remove_reader(self._input.fd)
        if self._timer is not None:
            self._timer.cancel()
        self._input.close()

    def _resume(self) -> None:
        if self._input.fd < 0:
            return
        try:
            if self._is_pollable:
                self._loop.add_reader(self._input.fd, self._readable)
                return
        except PermissionError:
            # A regular file or /dev/null is always ready, and epoll(7) refuses it.
            self._is_pollable = False
        self._loop.call_soon(self._readable)

    def _readable(self) -> None:
        if self._input.fd < 0:
            return
        try:
            data = self._input.read()
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            if self._hotkeys is not None:
                self._on_gone()
        elif self._hotkeys is not None:
            self._type(self._hotkeys, self._hotkeys.feed(data, self._loop.time()))
        else:
            self._pass(data)

    def _pass(self, data: bytes) -> None:
        if self._is_pollable:
            self._loop.remove_reader(self._input.fd)
        self._console.type(data)
        self._console.when_input_has_room(self._resume)

    def _type(self, hotkeys: Hotkeys, pieces: list[bytes | Key]) -> None:
        for piece in pieces:
            if isinstance(piece, Key):
                self._on_key(piece)
            elif self._console.input_pending < TYPED_MAX:
                self._console.type(piece)
            elif not self._has_overflowed:
                self._has_overflowed = True
                self._on_overflow()
        self._set_timer(hotkeys)

    def _set_timer(self, hotkeys: Hotkeys) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if hotkeys.deadline is not None and self._input.fd >= 0:
            self._timer = self._loop.call_at(hotkeys.deadline, self._expire, hotkeys, hotkeys.deadline)

    def _expire(self, hotkeys: Hotkeys, deadline: float) -> None:
        # The event loop may call this too early, by up to the resolution of its clock.
        self._type(hotkeys, [hotkeys.expire(max(self._loop.time(), deadline))])

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Shows a machine's console in a process other than the machine's manager, for `vmctl console`.

The loop uses poll(2), because importing asyncio would slow the command down.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType

from .hotkeys import Hotkeys, Key
from .keyboard import TYPED_MAX
from .streams import READ_SIZE
from .terminal import Screen, Terminal

#: The number of queued bytes at which reading of piped input pauses.
_PIPED_MAX = 65536

#: Signals that end the command, after the terminal has been restored.
_END_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)


class ConsoleAttachment:
    """Relays between a console's socket and two descriptors. The caller keeps all three."""

    #: True if the console ended the attachment, not the user.
    has_hung_up = False

    def __init__(
        self, console: socket.socket, source: int, target: int, *, read_only: bool, on_resize: Callable[[], None]
    ) -> None:
        """Prepare the relay. `on_resize` is called at the start, and whenever the window's size changes."""
        console.setblocking(False)
        self._console = console
        self._source = source
        self._target = target
        self._read_only = read_only
        self._on_resize = on_resize
        self._is_terminal = os.isatty(source)
        self._hotkeys = Hotkeys() if self._is_terminal else None
        self._terminal = Terminal(source) if self._is_terminal else None
        self._screen = Screen()
        self._outgoing = bytearray()
        self._is_source_open = self._is_terminal or not read_only
        self._signals: list[int] = []

    def run(self) -> int:
        """Relay until the user detaches or the console ends; returns 0, or the number of the signal that ended it."""
        wake, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        handled = {number: signal.signal(number, self._signalled) for number in self._handled_signals()}
        old = signal.set_wakeup_fd(waker)
        try:
            self._take_terminal()
            return self._loop(wake)
        finally:
            signal.set_wakeup_fd(old)
            self._give_back()
            for number, handler in handled.items():
                signal.signal(number, handler)
            os.close(wake)
            os.close(waker)

    def _handled_signals(self) -> list[signal.Signals]:
        ends = [each for each in _END_SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]
        return [*ends, signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH]

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        self._signals.append(number)

    # The loop.

    def _loop(self, wake: int) -> int:
        while True:
            ready = self._wait(wake)
            if wake in ready:
                os.read(wake, 512)
                if number := self._obey_signals():
                    return number
            if self._console.fileno() in ready and not self._exchange(ready[self._console.fileno()]):
                self.has_hung_up = True
                return 0
            if self._source in ready and not self._read():
                return 0
            if self._hotkeys is not None:
                self._type(self._hotkeys.expire(time.monotonic()))

    def _wait(self, wake: int) -> dict[int, int]:
        poll = select.poll()
        poll.register(wake, select.POLLIN)
        poll.register(self._console, select.POLLIN | (select.POLLOUT if self._outgoing else 0))
        if self._is_source_open and (self._is_terminal or len(self._outgoing) < _PIPED_MAX):
            poll.register(self._source, select.POLLIN)
        deadline = self._hotkeys.deadline if self._hotkeys is not None else None
        seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
        # Round up: poll(2) would otherwise return before the deadline, and the loop would spin.
        return dict(poll.poll(None if seconds is None else int(seconds * 1000) + 1))

    def _exchange(self, events: int) -> bool:
        """Send input and show output; returns False when the console has ended."""
        try:
            if events & select.POLLOUT and self._outgoing:
                del self._outgoing[: self._console.send(bytes(self._outgoing[:READ_SIZE]))]
            data = self._console.recv(READ_SIZE)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._screen.show(data)
        rest = data
        while rest:
            rest = rest[os.write(self._target, rest) :]
        return bool(data)

    def _read(self) -> bool:
        """Read input from the user. Returns False when the user detaches, or the terminal has hung up."""
        try:
            data = os.read(self._source, READ_SIZE)
        except OSError:
            data = b""
        if not data:
            self._is_source_open = False
            return not self._is_terminal
        if self._hotkeys is None:
            self._type(data)
            return True
        for piece in self._hotkeys.feed(data, time.monotonic()):
            if piece is Key.END:
                return False
            # Only the manager acts on the other key sequences; this command passes them to the guest.
            self._type(piece.value if isinstance(piece, Key) else piece)
        return True

    def _type(self, data: bytes) -> None:
        if not self._read_only and len(self._outgoing) < TYPED_MAX:
            self._outgoing += data

    # The terminal and the signals.

    def _obey_signals(self) -> int:
        """Handle received signals; returns the number of a signal that ends the command, or 0."""
        signals, self._signals = self._signals, []
        for number in signals:
            if number in _END_SIGNALS:
                return number
            if number == signal.SIGTSTP:
                self._stop()
            elif number == signal.SIGCONT:
                self._take_terminal()
            elif number == signal.SIGWINCH:
                self._on_resize()
        return 0

    def _stop(self) -> None:
        """Stop this process as the shell's job control expects, and make the terminal raw again on SIGCONT."""
        if self._terminal is not None:
            self._terminal.restore()
        handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, handler)
        self._take_terminal()

    def _take_terminal(self) -> None:
        if self._terminal is not None:
            self._terminal.raw(typed=True)
        self._on_resize()

    def _give_back(self) -> None:
        if os.isatty(self._target) and (reset := self._screen.reset()):
            with contextlib.suppress(OSError):
                os.write(self._target, reset)
        if self._terminal is not None:
            self._terminal.restore()

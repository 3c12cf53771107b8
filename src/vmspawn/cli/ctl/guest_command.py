# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs one command in a guest on this process's standard streams, for `vmctl exec` and `vmctl shell`.

Each stream is a socket to QEMU. A thread copies each stream, so that a blocked stream does not delay the others. The
main thread waits for the command's end.
"""

from __future__ import annotations

import base64
import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from errno import EIO
from types import FrameType
from typing import Any, NamedTuple

from ...console.hotkeys import Hotkeys, Key
from ...console.terminal import Screen, Terminal, window_size
from ...control.client import Client
from ...errors import NotConnected, SystemFailure, Timeout, VmspawnError
from ...inside.terminal_input import end_of_input
from ...text import printable
from ...timeouts import REPLY_GRACE
from ..disconnect import watching
from ..entrypoint import EXIT_OWN_FAILURE, EXIT_TIMED_OUT
from .execute_replies import exit_status, take_streams
from .replies import MACHINE

STDIN, STDOUT, STDERR = 0, 1, 2

_PIECE = 256 * 1024

#: Seconds that the guest may send nothing, before the rest of an ended command's output counts as lost.
_OUTPUT_TIMEOUT = 10.0

#: Seconds for the call that reports the window's size.
_RESIZE_TIMEOUT = 5.0

_END_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Wish(NamedTuple):
    """A command to run. Without arguments, it is the user's login shell."""

    #: The name that begins messages: vmctl or vmspawn.
    program: str
    machine: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    directory: str | None
    user: str | None
    stdin: bool
    terminal: bool
    #: Seconds within which the command must start.
    timeout: float
    #: Seconds within which the command must end.
    time_limit: float | None


def run(wish: Wish) -> int:
    """Run a command until it ends, and return its exit status, as a shell reports it. Raises VmspawnError.

    A signal that ends this process also ends the command.
    """
    with contextlib.ExitStack() as stack:
        size = _size() if wish.terminal else None
        client = stack.enter_context(Client(wish.machine, timeout=wish.timeout + REPLY_GRACE))
        disconnect = stack.enter_context(watching(wish.machine, client.connection))
        client.subscribe(f"{MACHINE}.Execute", _parameters(wish, size))
        try:
            reply = _next(client, wish.timeout + REPLY_GRACE)
            if reply["state"] != "started":
                return _failed(wish.program, reply)
            command = _Command(wish, client, reply)
            with command.raw_terminal(), command.signals():
                return command.run()
        except NotConnected:
            disconnect.check()
            raise


def _parameters(wish: Wish, size: tuple[int, int] | None) -> dict[str, Any]:
    return {
        "arguments": [_encode(each) for each in wish.arguments],
        "environment": [_encode(f"{name}={value}") for name, value in wish.environment.items()],
        "directory": None if wish.directory is None else _encode(wish.directory),
        "user": None if wish.user is None else _encode(wish.user),
        "stdin": wish.stdin,
        "rows": None if size is None else size[0],
        "columns": None if size is None else size[1],
        "base64": True,
        "timeoutUSec": int(wish.timeout * 1_000_000),
    }


def _encode(text: str) -> str:
    return base64.b64encode(os.fsencode(text)).decode()


def _size() -> tuple[int, int]:
    sizes = [window_size(fd) for fd in (STDOUT, STDIN)]
    return next((size for size in sizes if all(size)), (24, 80))


def _next(client: Client, seconds: float) -> dict[str, Any]:
    reply = client.next_reply(seconds)
    if reply is None:
        raise Timeout(f"{client.service} did not answer within {seconds:g} s")
    return reply


def _failed(program: str, reply: Mapping[str, Any]) -> int:
    """Report that a command could not be started, and return its exit status."""
    print(f"{program}: cannot run the command: {printable(reply['message'])}", file=sys.stderr)
    return int(reply["status"])


class _Output:
    """Copies a command's output to one of vmctl's descriptors, in a separate thread."""

    def __init__(self, source: socket.socket, target: int, changed: threading.Condition, screen: Screen | None) -> None:
        self._source = source
        self._target = target
        self._changed = changed
        self._screen = screen
        #: The number of written bytes.
        self.total = 0
        #: True when no more bytes will be written.
        self.is_done = False
        #: The error number that ended the copying, or 0. A reader that closes its pipe is not an error.
        self.errno = 0
        #: True while the thread waits for the guest; False while it waits for the reader of vmctl's output.
        self.is_waiting = True
        threading.Thread(target=self._move, daemon=True).start()

    def _move(self) -> None:
        buffer = bytearray(_PIECE)
        view = memoryview(buffer)
        # Closing the socket makes the command's next write fail with SIGPIPE.
        with contextlib.suppress(OSError), self._source:
            while (count := self._source.recv_into(buffer)) and self._write(view[:count]):
                with self._changed:
                    self.total += count
                    self.is_waiting = True
                    self._changed.notify()
        with self._changed:
            self.is_done = True
            self._changed.notify()

    def _write(self, data: memoryview) -> bool:
        """Write all of `data`. Returns False if that fails."""
        self.is_waiting = False
        if self._screen is not None:
            self._screen.show(bytes(data))
        try:
            while data:
                # Another process may have made the file non-blocking.
                with contextlib.suppress(BlockingIOError):
                    data = data[os.write(self._target, data) :]
                    continue
                _wait_until_writable(self._target)
        except BrokenPipeError:
            return False
        except OSError as error:
            self.errno = error.errno or EIO
            return False
        return True

    def has(self, count: int) -> bool:
        """Return whether `count` bytes were written, or no more will be written."""
        return self.is_done or self.total >= count


def _wait_until_writable(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    poll.poll()


class _Input:
    """Copies vmctl's input to a command, in a separate thread.

    If vmctl's input is a terminal, typing ^] three times ends the command.
    """

    def __init__(self, target: socket.socket, on_leave: Callable[[], None] | None, *, is_typed: bool) -> None:
        """Begin to copy. `is_typed` is True if the command runs on a terminal, which `target` types on."""
        self._target = target
        self._is_typed = is_typed
        self._on_leave = on_leave
        self._hotkeys = Hotkeys() if on_leave is not None else None
        threading.Thread(target=self._move, daemon=True).start()

    def _move(self) -> None:
        # A command that reads no more input closes the socket; the rest of the input is dropped.
        last = b""
        with contextlib.suppress(OSError):
            while data := self._read():
                self._target.sendall(data)
                last = data
            if self._hotkeys is None:
                self._end(last)

    def _end(self, last: bytes) -> None:
        if self._is_typed:
            self._target.sendall(end_of_input(last))
        else:
            self._target.shutdown(socket.SHUT_WR)

    def _read(self) -> bytes:
        if self._hotkeys is None:
            return os.read(STDIN, _PIECE)
        typed = b""
        while not typed:
            if self._is_readable(self._hotkeys.deadline):
                data = os.read(STDIN, _PIECE)
                if not data:
                    return b""
                for piece in self._hotkeys.feed(data, time.monotonic()):
                    if piece is Key.END and self._on_leave is not None:
                        self._on_leave()
                        return b""
                    typed += piece.value if isinstance(piece, Key) else piece
            typed += self._hotkeys.expire(time.monotonic())
        return typed

    @staticmethod
    def _is_readable(deadline: float | None) -> bool:
        poll = select.poll()
        poll.register(STDIN, select.POLLIN)
        return bool(poll.poll(None if deadline is None else max(0, int((deadline - time.monotonic()) * 1000) + 1)))


class _Command:
    """A running command."""

    def __init__(self, wish: Wish, client: Client, started: Mapping[str, Any]) -> None:
        self._wish = wish
        self._client = client
        self._id: str = started["id"]
        self._left = False
        self._signals: list[int] = []
        self._deadline = None if wish.time_limit is None else time.monotonic() + wish.time_limit
        self._wake, self._waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._screen = Screen() if wish.terminal and os.isatty(STDOUT) else None
        self._terminal = Terminal(STDIN) if wish.terminal and os.isatty(STDIN) else None
        self._streams = take_streams(client, started)

    def run(self) -> int:
        """Copy the streams until the command has ended and all its output is written."""
        changed = threading.Condition()
        streams = self._streams
        outputs = [
            (_Output(streams[name], target, changed, self._screen), count)
            for name, target, count in (
                ("stdout", STDOUT, "stdoutBytes"),
                ("stderr", STDERR, "stderrBytes"),
                ("terminal", STDOUT, "stdoutBytes"),
            )
            if name in streams
        ]
        if (target := streams.get("terminal") or streams.get("stdin")) is not None:
            on_leave = self._leave if self._terminal is not None else None
            _Input(target, on_leave, is_typed="terminal" in streams)
        end = self._end()
        if end is None:
            return EXIT_TIMED_OUT if not self._left else EXIT_OWN_FAILURE
        with changed:
            self._drain(changed, [(output, int(end[count] or 0)) for output, count in outputs])
        return exit_status(end)

    def _drain(self, changed: threading.Condition, outputs: Sequence[tuple[_Output, int]]) -> None:
        """Wait until all output is written.

        Raises NotConnected if the guest stops sending it, SystemFailure if it cannot be written.
        """
        while not all(output.has(count) for output, count in outputs):
            idle = [output for output, count in outputs if not output.has(count) and output.is_waiting]
            if not changed.wait(_OUTPUT_TIMEOUT) and idle:
                raise NotConnected("the guest did not send all output of the command")
        if number := next((output.errno for output, _ in outputs if output.errno), 0):
            raise SystemFailure("cannot write the command's output", number)

    def _end(self) -> dict[str, Any] | None:
        """Wait for the command's end. Returns None if the time limit passes, or the user types ^]^]^]."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        poll.register(self._client.connection, select.POLLIN)
        while True:
            if self._client.is_answered(within=0):
                return _next(self._client, REPLY_GRACE)
            left = None if self._deadline is None else self._deadline - time.monotonic()
            if self._left:
                return None
            if left is not None and left <= 0:
                seconds = self._wish.time_limit
                print(f"{self._wish.program}: the command was ended after {seconds:g} s", file=sys.stderr)
                return None
            ready = dict(poll.poll(None if left is None else int(left * 1000) + 1))
            if self._wake in ready:
                os.read(self._wake, 512)
                self._obey_signals()

    def _leave(self) -> None:
        self._left = True
        os.write(self._waker, b"\0")

    # The terminal and the signals.

    @contextlib.contextmanager
    def raw_terminal(self) -> Iterator[None]:
        """Make the terminal raw while the command uses it."""
        if self._terminal is not None:
            self._terminal.raw(typed=True)
        try:
            yield
        except BaseException:
            # The command may have left terminal modes set.
            if self._screen is not None:
                with contextlib.suppress(OSError):
                    os.write(STDOUT, self._screen.reset())
            raise
        finally:
            if self._terminal is not None:
                self._terminal.restore()

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Let signals end the command, and pass changes of the window's size to it."""
        numbers = [each for each in _END_SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]
        if self._wish.terminal:
            numbers += [signal.SIGWINCH]
        handled = {number: signal.signal(number, self._signalled) for number in numbers}
        old = signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(old)
            for number, handler in handled.items():
                signal.signal(number, handler)

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        self._signals.append(number)

    def _obey_signals(self) -> None:
        signals, self._signals = self._signals, []
        for number in signals:
            if number == signal.SIGWINCH:
                self._resize()
            else:
                # The exit status of a shell for a program that a signal ended.
                sys.exit(128 + number)

    def _resize(self) -> None:
        rows, columns = _size()
        with contextlib.suppress(VmspawnError), Client(self._wish.machine, timeout=_RESIZE_TIMEOUT) as client:
            client.call(f"{MACHINE}.ResizeTerminal", {"id": self._id, "rows": rows, "columns": columns})

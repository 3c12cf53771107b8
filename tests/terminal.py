# SPDX-License-Identifier: LGPL-2.1-or-later
"""A person at a terminal: a real pty with a program on it, what it shows, and its settings before and after."""

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.commands import DEADLINE, VMCTL, VMSPAWN, vmctl
from tests.machines import fresh_name

END = b"\x1d\x1d\x1d"
POWER_OFF = b"\x1d\x1dp"
REBOOT = b"\x1d\x1dr"

READY = b"vmspawn-guest: ready"
PROMPT = b"vmspawn# "


class Tty:
    """A pty of which both ends are held, so that its settings outlive the programs on it.

    What was shown and not waited for yet is in `shown`; everything that ever was, in `everything`.
    """

    def __init__(self, rows: int = 24, columns: int = 80) -> None:
        self.master, self.slave = pty.openpty()
        self.path = os.ttyname(self.slave)
        self.resize(rows, columns)
        # A size is not a setting that a program could spoil; everything else that stty(1) shows is.
        self.settings_before = self.settings()
        self.shown = bytearray()
        self.before = b""
        self.everything = bytearray()
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, command: list[str], **environment: str) -> subprocess.Popen[bytes]:
        """Run a program that has this terminal, as its session's leader."""
        process = subprocess.Popen(
            command,
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={**os.environ, "TERM": "xterm-256color", **environment},
        )
        self.processes.append(process)
        return process

    def resize(self, rows: int, columns: int) -> None:
        """Change the window; the foreground process gets SIGWINCH."""
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def settings(self) -> str:
        """`stty -a`, without the window's size."""
        shown = subprocess.run(
            ["stty", "-a", "-F", self.path], stdin=subprocess.DEVNULL, check=True, capture_output=True, text=True
        ).stdout
        return re.sub(r"rows \d+; columns \d+;", "", shown)

    def type(self, data: bytes) -> None:
        """Type, while what is shown is read, as a terminal does."""
        deadline = time.monotonic() + DEADLINE
        while data:
            ready, writable, _ = select.select([self.master], [self.master], [], deadline - time.monotonic())
            assert ready or writable, f"the terminal takes no more input; {len(data)} bytes are left"
            if ready:
                self._read()
            if writable:
                data = data[os.write(self.master, data[:512]) :]

    def type_slowly(self, pieces: list[bytes], pause: float) -> None:
        """Type pieces with a person's pauses between them, in which what is shown is read."""
        for number, piece in enumerate(pieces):
            next_at = time.monotonic() + (pause if number else 0.0)
            while (left := next_at - time.monotonic()) > 0:
                if select.select([self.master], [], [], left)[0]:
                    self._read()
            self.type(piece)

    def expect(self, pattern: bytes, *, timeout: float = DEADLINE) -> re.Match[bytes]:
        """Wait until what is shown matches, and forget it and all before it, which `before` has then."""
        expression = re.compile(pattern)
        deadline = time.monotonic() + timeout
        start = 0
        while not (match := expression.search(bytes(self.shown[start:]))):
            ready, _, _ = select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{pattern!r} was not shown; there is: {self.shown[-3000:]!r}"
            # What matches is shorter than a few lines.
            start = max(0, len(self.shown) - 400)
            self._read()
        self.before = bytes(self.shown[: start + match.start()])
        del self.shown[: start + match.end()]
        return match

    def wait_until_raw(self) -> None:
        """Wait until a program has taken the terminal: vmspawn does just after it has said that the machine runs."""
        deadline = time.monotonic() + DEADLINE
        while termios.tcgetattr(self.slave)[3] & termios.ICANON:
            assert time.monotonic() < deadline, "no program took the terminal"
            assert all(process.poll() is None for process in self.processes), bytes(self.everything)

    def _read(self) -> None:
        data = os.read(self.master, 65536)
        self.shown += data
        self.everything += data

    def drain(self) -> None:
        """Read what is there."""
        while select.select([self.master], [], [], 0)[0]:
            self._read()

    def wait(self, process: subprocess.Popen[bytes], *, timeout: float = DEADLINE) -> int:
        """Read on until a program ends; its exit status. The terminal must be then as it was before."""
        deadline = time.monotonic() + timeout
        pidfd = os.pidfd_open(process.pid)
        try:
            ended = False
            while not ended:
                ready, _, _ = select.select([self.master, pidfd], [], [], max(0.0, deadline - time.monotonic()))
                assert ready, f"the program did not end; there is: {self.shown[-3000:]!r}"
                if self.master in ready:
                    self._read()
                ended = pidfd in ready
        finally:
            os.close(pidfd)
        self.drain()
        status = process.wait()
        assert self.settings() == self.settings_before
        return status

    def close(self) -> None:
        """End what runs and give the pty up."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for fd in (self.master, self.slave):
            with contextlib.suppress(OSError):
                os.close(fd)


class Seated(Tty):
    """A terminal with vmspawn on it."""

    def __init__(self, name: str, arguments: tuple[str, ...], command: list[str] | None = None) -> None:
        super().__init__()
        self.name = name
        self.process = self.start(command or [*VMSPAWN, "-M", name, *arguments])

    def run(self, command: str, *, timeout: float = DEADLINE) -> bytes:
        """Run a command in the guest's shell; what it printed. The mark is not echoed as it is printed."""
        self.type(command.encode() + b"; echo do''ne-$?\n")
        mark = self.expect(rb"done-(\d+)\r\n", timeout=timeout)
        assert mark[1] == b"0", self.before
        return self.before

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to vmspawn."""
        self.process.send_signal(number)

    def ended(self, *, timeout: float = DEADLINE) -> int:
        """Wait for vmspawn's end; its exit status."""
        return self.wait(self.process, timeout=timeout)

    def close(self) -> None:
        """End the machine as well; that, too, leaves the terminal as it was."""
        try:
            if self.process.poll() is None and vmctl("terminate", self.name).returncode == 0:
                self.ended()
        finally:
            super().close()


@contextmanager
def seated(*arguments: str, name: str | None = None) -> Iterator[Seated]:
    """vmspawn on a terminal of its own; ended afterwards if it still runs."""
    terminal = Seated(name or fresh_name(), arguments)
    try:
        yield terminal
    finally:
        terminal.close()


def shell_job(shell: int) -> int:
    """The process id of a shell's only job."""
    return int(Path(f"/proc/{shell}/task/{shell}/children").read_text())


@contextmanager
def attached(machine: str) -> Iterator[Tty]:
    """A terminal with `vmctl console` on it, in its first process."""
    with terminal() as tty:
        tty.start([*VMCTL, "console", machine])
        tty.expect(rb"press \^\] three times")
        tty.wait_until_raw()
        yield tty


@contextmanager
def terminal() -> Iterator[Tty]:
    """A terminal with nothing on it yet."""
    tty = Tty()
    try:
        yield tty
    finally:
        tty.close()

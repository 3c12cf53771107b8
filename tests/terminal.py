# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs programs on a real pty, and checks their output and the terminal's settings."""

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
    """A pty with both ends open, so that its settings outlive the programs on it.

    `shown` is the output after the last match of `expect`; `everything` is all output.
    """

    def __init__(self, rows: int = 24, columns: int = 80) -> None:
        self.master, self.slave = pty.openpty()
        self.path = os.ttyname(self.slave)
        self.resize(rows, columns)
        # A program must restore everything that stty(1) shows, except the size.
        self.settings_before = self.settings()
        self.shown = bytearray()
        self.before = b""
        self.everything = bytearray()
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, command: list[str], **environment: str) -> subprocess.Popen[bytes]:
        """Start a program as the session leader of this terminal."""
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
        """Resize the window. The foreground process gets SIGWINCH."""
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def settings(self) -> str:
        """Return the output of `stty -a`, without the window's size."""
        shown = subprocess.run(
            ["stty", "-a", "-F", self.path], stdin=subprocess.DEVNULL, check=True, capture_output=True, text=True
        ).stdout
        return re.sub(r"rows \d+; columns \d+;", "", shown)

    def type(self, data: bytes) -> None:
        """Type, and read the output meanwhile, as a terminal does."""
        deadline = time.monotonic() + DEADLINE
        while data:
            ready, writable, _ = select.select([self.master], [self.master], [], deadline - time.monotonic())
            assert ready or writable, f"the terminal takes no more input; {len(data)} bytes are left"
            if ready:
                self._read()
            if writable:
                data = data[os.write(self.master, data[:512]) :]

    def type_slowly(self, pieces: list[bytes], pause: float) -> float:
        """Type pieces with pauses between them, and read the output meanwhile.

        A pause begins when the program has read the piece before, so that a slow program does not shorten it. Returns
        the seconds until the program had read all pieces.
        """
        began_at = next_at = time.monotonic()
        for piece in pieces:
            while (left := next_at - time.monotonic()) > 0:
                if select.select([self.master], [], [], left)[0]:
                    self._read()
            self.type(piece)
            self._wait_until_read()
            next_at = time.monotonic() + pause
        return time.monotonic() - began_at

    def _wait_until_read(self) -> None:
        """Wait until the program has read everything that was typed."""
        deadline = time.monotonic() + DEADLINE
        while struct.unpack("i", fcntl.ioctl(self.slave, termios.FIONREAD, bytes(4)))[0]:
            assert time.monotonic() < deadline, "the program does not read what is typed"
            if select.select([self.master], [], [], 0.005)[0]:
                self._read()

    def expect(self, pattern: bytes, *, timeout: float = DEADLINE) -> re.Match[bytes]:
        """Wait until the output matches, and consume it up to the end of the match. `before` is the text before it."""
        expression = re.compile(pattern)
        deadline = time.monotonic() + timeout
        start = 0
        while not (match := expression.search(bytes(self.shown[start:]))):
            ready, _, _ = select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{pattern!r} was not shown; the output is: {self.shown[-3000:]!r}"
            # A match is shorter than a few lines.
            start = max(0, len(self.shown) - 400)
            self._read()
        self.before = bytes(self.shown[: start + match.start()])
        del self.shown[: start + match.end()]
        return match

    def wait_until_raw(self) -> None:
        """Wait until a program has made the terminal raw. vmspawn does that just after it reports a running machine."""
        deadline = time.monotonic() + DEADLINE
        while termios.tcgetattr(self.slave)[3] & termios.ICANON:
            assert time.monotonic() < deadline, "no program took the terminal"
            assert all(process.poll() is None for process in self.processes), bytes(self.everything)

    def _read(self) -> None:
        data = os.read(self.master, 65536)
        self.shown += data
        self.everything += data

    def drain(self) -> None:
        """Read all available output."""
        while select.select([self.master], [], [], 0)[0]:
            self._read()

    def wait(self, process: subprocess.Popen[bytes], *, timeout: float = DEADLINE) -> int:
        """Read until a program ends, and return its exit status. The terminal's settings must be restored by then."""
        deadline = time.monotonic() + timeout
        pidfd = os.pidfd_open(process.pid)
        try:
            ended = False
            while not ended:
                ready, _, _ = select.select([self.master, pidfd], [], [], max(0.0, deadline - time.monotonic()))
                assert ready, f"the program did not end; the output is: {self.shown[-3000:]!r}"
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
        """Kill the programs that still run, and close the pty."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for fd in (self.master, self.slave):
            with contextlib.suppress(OSError):
                os.close(fd)


class Seated(Tty):
    """A terminal that vmspawn runs on."""

    def __init__(self, name: str, arguments: tuple[str, ...], command: list[str] | None = None) -> None:
        super().__init__()
        self.name = name
        self.process = self.start(command or [*VMSPAWN, "-M", name, *arguments])

    def run(self, command: str, *, timeout: float = DEADLINE) -> bytes:
        """Run a command in the guest's shell, and return its output. The command's echo does not match the mark."""
        self.type(command.encode() + b"; echo do''ne-$?\n")
        mark = self.expect(rb"done-(\d+)\r\n", timeout=timeout)
        assert mark[1] == b"0", self.before
        return self.before

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to vmspawn."""
        self.process.send_signal(number)

    def ended(self, *, timeout: float = DEADLINE) -> int:
        """Wait for vmspawn's end, and return its exit status."""
        return self.wait(self.process, timeout=timeout)

    def close(self) -> None:
        """End the machine too. The terminal's settings must be restored afterwards."""
        try:
            if self.process.poll() is None and vmctl("terminate", self.name).returncode == 0:
                self.ended()
        finally:
            super().close()


@contextmanager
def seated(*arguments: str, name: str | None = None) -> Iterator[Seated]:
    """Start vmspawn on a new terminal, and end it on exit if it still runs."""
    terminal = Seated(name or fresh_name(), arguments)
    try:
        yield terminal
    finally:
        terminal.close()


def shell_job(shell: int) -> int:
    """Return the process id of a shell's only job."""
    return int(Path(f"/proc/{shell}/task/{shell}/children").read_text())


@contextmanager
def attached(machine: str) -> Iterator[Tty]:
    """Start `vmctl console` on a new terminal, as its session leader."""
    with terminal() as tty:
        tty.start([*VMCTL, "console", machine])
        tty.expect(rb"\^\]\^\]\^\] detaches")
        tty.wait_until_raw()
        yield tty


@contextmanager
def terminal() -> Iterator[Tty]:
    """Open a terminal without a program."""
    tty = Tty()
    try:
        yield tty
    finally:
        tty.close()

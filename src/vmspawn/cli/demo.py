# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs `./dev demo`, which shows hot-plug with the commands that a user would type.

A guest boots, gets disks on three buses, writes to one of them, loses all three, and powers off.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import NoReturn

from ..errors import MachineEnded, StartError, Timeout
from ..host import runtime
from .entrypoint import run

_MACHINE = "demo"
_SIZE = 64 << 20
_TEXT = "Hello from inside the guest"

#: Seconds that the guest has for each step. Booting under emulation takes long on a busy host.
_STEP_TIMEOUT = 120.0

_DISKS = (("red", "virtio-blk"), ("green", "nvme"), ("blue", "virtio-scsi"))


class Transcript:
    """Prints lines with the seconds since the start and a speaker."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def add(self, speaker: str, text: str) -> None:
        """Print a line. `speaker` is empty for the demo itself, `$` for a command, `guest` for the guest's console."""
        seconds = f"{time.monotonic() - self._start:7.2f} s"
        style = {"$": "\033[1m", "guest": "\033[36m", "": "\033[32m"}.get(speaker, "") if self._colour else ""
        print(f"{seconds}  {speaker:>6}  {style}{text}{chr(27) + '[0m' if style else ''}", flush=True)


class Console:
    """Shows the guest's messages, and types commands on its console."""

    def __init__(self, transcript: Transcript) -> None:
        self._transcript = transcript
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(os.path.join(runtime.runtime_root(), _MACHINE, runtime.CONSOLE))
        self._buffer = b""

    def wait_for(self, text: str) -> str:
        """Read lines until one contains `text`, and return it. Raises MachineEnded, Timeout."""
        deadline = time.monotonic() + _STEP_TIMEOUT
        while True:
            line, newline, rest = self._buffer.partition(b"\n")
            if newline:
                self._buffer = rest
                shown = self._show(line.decode(errors="replace").strip())
                if text in shown:
                    return shown
                continue
            self._socket.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                raise Timeout(f"the guest did not print {text!r} within {_STEP_TIMEOUT:g} s") from None
            if not data:
                raise MachineEnded(f"the guest ended before it printed {text!r}")
            self._buffer += data

    def _show(self, line: str) -> str:
        if "vmspawn-guest:" in line and "printf" not in line:
            self._transcript.add("guest", line.partition("vmspawn-guest: ")[2])
        return line

    def type(self, command: str) -> None:
        """Type a command into the guest's shell."""
        self._transcript.add("guest", f"# {command}")
        self._socket.sendall(command.encode() + b"\n")

    def close(self) -> None:
        """Disconnect."""
        self._socket.close()


class Demo:
    """The demo's machine and its steps."""

    def __init__(self, transcript: Transcript, folder: str) -> None:
        self._transcript = transcript
        self._folder = folder
        self._vmspawn: subprocess.Popen[str] | None = None

    def run(self, options: list[str]) -> None:
        """Run all steps. Raises VmspawnError if one fails."""
        self._start(options)
        console = Console(self._transcript)
        try:
            console.wait_for("ready")
            for name, bus in _DISKS:
                self._attach(console, name, bus)
            self._vmctl("list-disks", _MACHINE)
            self._write_and_read_back(console)
            for name, _ in _DISKS:
                self._vmctl("detach-disk", _MACHINE, f"{name}.raw")
                console.wait_for("went")
            self._power_off(console)
        finally:
            console.close()

    def close(self) -> None:
        """End the machine if it still runs."""
        if self._vmspawn is not None and self._vmspawn.poll() is None:
            subprocess.run([*_command("ctl"), "terminate", _MACHINE], check=False, capture_output=True)
            self._vmspawn.wait()

    def _start(self, options: list[str]) -> None:
        arguments = ["--guest=builtin", f"--machine={_MACHINE}", "--console=headless", *options]
        self._transcript.add("$", f"vmspawn {' '.join(arguments)} &")
        self._vmspawn = subprocess.Popen([*_command("spawn"), *arguments], stderr=subprocess.PIPE, text=True)
        assert self._vmspawn.stderr is not None
        for line in self._vmspawn.stderr:
            self._transcript.add("", line.strip())
            if "is running" in line:
                return
        # Wait for vmspawn's end, so that `close` does not end a machine of the same name that runs already.
        self._vmspawn.wait()
        raise StartError("the machine did not start")

    def _attach(self, console: Console, name: str, bus: str) -> None:
        path = os.path.join(self._folder, f"{name}.raw")
        with open(path, "wb") as image:
            image.truncate(_SIZE)
        self._vmctl("attach-disk", _MACHINE, path, f"--bus={bus}")
        console.wait_for(f"serial {name}.raw")

    def _write_and_read_back(self, console: Console) -> None:
        disk = "/dev/disk/by-id/virtio-red.raw"
        # printf assembles the answer, so that the echo of the command does not match it.
        console.type(f"echo {_TEXT} | dd of={disk} conv=fsync 2>/dev/null && printf 'vmspawn-guest: %s\\n' written")
        console.wait_for("vmspawn-guest: written")
        with open(os.path.join(self._folder, "red.raw"), "rb") as image:
            found = image.readline(200).decode(errors="replace").strip()
        if found != _TEXT:
            raise MachineEnded(f"the host's file begins with {found!r} instead of the guest's text")
        self._transcript.add("", f"red.raw on the host now begins with: {found}")

    def _power_off(self, console: Console) -> None:
        assert self._vmspawn is not None
        self._transcript.add("$", f"kill -TERM {self._vmspawn.pid}")
        self._vmspawn.send_signal(signal.SIGTERM)
        console.wait_for("powering off")
        assert self._vmspawn.stderr is not None
        for line in self._vmspawn.stderr:
            self._transcript.add("", line.strip())
        if status := self._vmspawn.wait():
            raise MachineEnded(f"vmspawn exited with status {status}")
        self._transcript.add("", "vmspawn exited with status 0 and left nothing behind")

    def _vmctl(self, *arguments: str) -> None:
        self._transcript.add("$", f"vmctl {' '.join(arguments)}")
        done = subprocess.run([*_command("ctl"), *arguments], check=False, capture_output=True, text=True)
        for line in (done.stdout + done.stderr).splitlines():
            self._transcript.add("", line)
        if done.returncode:
            raise MachineEnded(f"vmctl {arguments[0]} failed")


def _command(name: str) -> list[str]:
    return [sys.executable, "-m", f"vmspawn.cli.{name}"]


def _main() -> int:
    print("A guest boots, gets and loses disks on three buses, and powers off.\n", flush=True)
    transcript = Transcript()
    with tempfile.TemporaryDirectory(prefix="vmspawn-demo-") as folder:
        demo = Demo(transcript, folder)
        try:
            demo.run(sys.argv[1:])
        finally:
            demo.close()
    return 0


def main() -> NoReturn:
    """Run the demo. Command-line arguments are more options for vmspawn."""
    run("demo", _main)


if __name__ == "__main__":
    main()

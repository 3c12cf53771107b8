# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs the commands as a user does, in separate processes; tests check their output and exit status."""

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.conftest import make_raw
from tests.machines import fresh_name

VMCTL = [sys.executable, "-m", "vmspawn.cli.ctl"]
VMSPAWN = [sys.executable, "-m", "vmspawn.cli.spawn"]

#: Options with which SeaBIOS prints to the serial port, and its last line if nothing boots.
SERIAL_BIOS = ("--qemu-arg=-machine", "--qemu-arg=graphics=off")
NOTHING_TO_BOOT = "No bootable device."

#: The deadline of each wait, in seconds.
DEADLINE = 60.0


def vmctl(*arguments: str, timeout: float = DEADLINE) -> subprocess.CompletedProcess[str]:
    """Run vmctl until it ends."""
    return subprocess.run([*VMCTL, *arguments], capture_output=True, text=True, timeout=timeout, check=False)


def vmspawn(*arguments: str, timeout: float = DEADLINE) -> subprocess.CompletedProcess[str]:
    """Run a vmspawn that ends by itself."""
    command = [*VMSPAWN, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, check=False, stdin=subprocess.DEVNULL
    )


def vmctl_output(*arguments: str) -> str:
    """Run vmctl, which must succeed; returns its output."""
    done = vmctl(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def one_line(done: subprocess.CompletedProcess[str], program: str) -> str:
    """Check that a command's error is one line, and at most one more with a hint. Returns the first line."""
    lines = [line for line in done.stderr.splitlines() if "no KVM" not in line]
    assert "Traceback" not in done.stderr
    assert len(lines) in (1, 2), done.stderr
    assert lines[0].startswith(f"{program}: ")
    assert all(line.startswith(" ") for line in lines[1:])
    return lines[0]


class Spawned:
    """A running vmspawn. Each wait reads both of its outputs."""

    def __init__(self, name: str, arguments: tuple[str, ...], *, program: Sequence[str] = ()) -> None:
        """Start `program`, by default this checkout's vmspawn."""
        self.name = name
        command = [*(program or VMSPAWN), "-M", name, *arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.output = {"stdout": "", "stderr": ""}
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._open = {"stdout": self.process.stdout, "stderr": self.process.stderr}

    def wait_for(self, text: str, *, stream: str = "stderr", timeout: float = DEADLINE) -> None:
        """Read until `text` was printed."""
        deadline = time.monotonic() + timeout
        while text not in self.output[stream]:
            assert self._read(deadline - time.monotonic()), f"{text!r} was not printed; the output is: {self.output}"

    def ended_before(self, text: str) -> int | None:
        """Read until `text` was printed, or until vmspawn ended. Returns the exit status, or None if vmspawn runs."""
        deadline = time.monotonic() + DEADLINE
        while text not in self.output["stderr"]:
            if not self._read(deadline - time.monotonic()):
                return self.process.wait(timeout=max(0.1, deadline - time.monotonic()))
        return None

    def wait(self, *, timeout: float = DEADLINE) -> int:
        """Read until the end, and return the exit status."""
        deadline = time.monotonic() + timeout
        while self._read(deadline - time.monotonic()):
            pass
        return self.process.wait(timeout=max(0.1, deadline - time.monotonic()))

    def hang_up(self, stream: str) -> None:
        """Close the reader's end of an output, so that vmspawn's writes to it fail."""
        self._open.pop(stream).close()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the manager."""
        self.process.send_signal(number)

    def close(self) -> None:
        """End the machine and vmspawn if they still run."""
        if self.process.poll() is None and not self.terminate():
            self.process.kill()
        self.wait()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        self.process.wait()

    def terminate(self) -> bool:
        """End the machine without asking the guest. Returns whether the manager accepted."""
        return vmctl("terminate", self.name).returncode == 0

    def _read(self, seconds: float) -> bool:
        """Read once from the readable streams. Returns False at the deadline, or at the end of both streams."""
        if not self._open:
            return False
        ready, _, _ = select.select(list(self._open.values()), [], [], max(0.0, seconds))
        for name, stream in tuple(self._open.items()):
            if stream in ready:
                data = os.read(stream.fileno(), 65536)
                self.output[name] += data.decode(errors="replace")
                if not data:
                    del self._open[name]
        return bool(ready)


@contextmanager
def spawned(*arguments: str, name: str | None = None) -> Iterator[Spawned]:
    """Start vmspawn with these arguments, and kill it on exit if it still runs."""
    running = Spawned(name or fresh_name(), arguments)
    try:
        yield running
    finally:
        running.close()


@contextmanager
def background(command: list[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Start another program, and kill it on exit if it still runs. The options are those of Popen."""
    process = subprocess.Popen(command, **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


@contextmanager
def idle(qemu: str, folder: Path) -> Iterator[Spawned]:
    """Start a vmspawn whose machine stays in its firmware, and wait until it is up."""
    image = make_raw(folder / "boot", 1 << 20)
    with spawned(f"--qemu={qemu}", f"--image={image}", "--ram=64M", "--console=headless") as running:
        running.wait_for("is running")
        yield running


def qemu_pid(machine: str) -> int:
    """Return the process id of a running machine's QEMU."""
    import json

    found = json.loads(vmctl("status", machine, "--json=short").stdout)
    return int(found["processId"])


def make_script(path: Path, text: str) -> Path:
    """Write an executable shell script."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def run_example(
    document: str, mark: str, folder: Path, replacements: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run the example in shell or Python that follows a mark in a document. `vmctl` runs from this checkout.

    `replacements` are for whole words: the machine's name, a port.
    """
    text = (Path(__file__).parents[1] / "docs" / document).read_text()
    found = re.search(rf"<!-- run: {mark} -->\n```(sh|python)\n(.*?)```", text, re.DOTALL)
    assert found
    command = {"sh": ["sh", "-ec"], "python": [sys.executable, "-c"]}[found[1]]
    script = found[2]
    for word, replacement in replacements.items():
        script = re.sub(rf"\b{word}\b", replacement, script)
    make_script(folder / "vmctl", f'exec {sys.executable} -m vmspawn.cli.ctl "$@"')
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(
        [*command, script], env=environment, cwd=folder, capture_output=True, text=True, timeout=DEADLINE
    )


@contextmanager
def sharing(source: str, listen: str) -> Iterator[subprocess.Popen[str]]:
    """Start `vmctl qmp-share`, and kill it on exit."""
    with subprocess.Popen([*VMCTL, "qmp-share", source, listen], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert "sharing" in process.stderr.readline()
            yield process
        finally:
            process.terminate()

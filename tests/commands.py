# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands as a user runs them: processes of their own, judged by what they print and how they exit."""

import os
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

#: Nothing here takes longer; a test that waits this long has failed.
DEADLINE = 60.0


def vmctl(*arguments: str, timeout: float = DEADLINE) -> subprocess.CompletedProcess[str]:
    """Run vmctl to its end."""
    return subprocess.run([*VMCTL, *arguments], capture_output=True, text=True, timeout=timeout, check=False)


def vmspawn(*arguments: str, timeout: float = DEADLINE) -> subprocess.CompletedProcess[str]:
    """Run a vmspawn that is expected to end by itself."""
    command = [*VMSPAWN, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, check=False, stdin=subprocess.DEVNULL
    )


def one_line(done: subprocess.CompletedProcess[str], program: str) -> str:
    """The error that a command ended with: one line, and at most one more with a hint."""
    lines = [line for line in done.stderr.splitlines() if "no KVM" not in line]
    assert "Traceback" not in done.stderr
    assert len(lines) in (1, 2), done.stderr
    assert lines[0].startswith(f"{program}: ")
    assert all(line.startswith(" ") for line in lines[1:])
    return lines[0]


class Spawned:
    """A running vmspawn. What it prints on either output is read while something is waited for."""

    def __init__(self, name: str, arguments: tuple[str, ...], *, program: Sequence[str] = ()) -> None:
        """Start `program`, which is this checkout's vmspawn unless another is named."""
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
            assert self._read(deadline - time.monotonic()), f"{text!r} did not come; there is: {self.output}"

    def ended_before(self, text: str) -> int | None:
        """Read until `text` was printed, or to the end: the exit status then."""
        deadline = time.monotonic() + DEADLINE
        while text not in self.output["stderr"]:
            if not self._read(deadline - time.monotonic()):
                return self.process.wait(timeout=max(0.1, deadline - time.monotonic()))
        return None

    def wait(self, *, timeout: float = DEADLINE) -> int:
        """Read to the end and return the exit status."""
        deadline = time.monotonic() + timeout
        while self._read(deadline - time.monotonic()):
            pass
        return self.process.wait(timeout=max(0.1, deadline - time.monotonic()))

    def hang_up(self, stream: str) -> None:
        """Close our end of an output: what it prints there fails from now on."""
        self._open.pop(stream).close()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the manager."""
        self.process.send_signal(number)

    def close(self) -> None:
        """End what still runs."""
        if self.process.poll() is None and not self.terminate():
            self.process.kill()
        self.wait()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        self.process.wait()

    def terminate(self) -> bool:
        """End the machine without asking the guest, and say whether that was heard."""
        return vmctl("terminate", self.name).returncode == 0

    def _read(self, seconds: float) -> bool:
        """Read once from what is readable; False at the deadline, or when both streams have ended."""
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
    """A vmspawn with these arguments, killed afterwards if it still runs."""
    running = Spawned(name or fresh_name(), arguments)
    try:
        yield running
    finally:
        running.close()


@contextmanager
def background(command: list[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Another program that runs meanwhile; killed afterwards if it still runs. The options are Popen's."""
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
    """A vmspawn that is up, whose guest is its firmware, looking for something to boot."""
    image = make_raw(folder / "boot", 1 << 20)
    with spawned(f"--qemu={qemu}", f"--image={image}", "--ram=64M", "--console=headless") as running:
        running.wait_for("is running")
        yield running


def qemu_pid(machine: str) -> int:
    """The process id of a running machine's QEMU."""
    import json

    found = json.loads(vmctl("status", machine, "--json=short").stdout)
    return int(found["processId"])


def make_script(path: Path, text: str) -> Path:
    """An executable shell script."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@contextmanager
def sharing(source: str, listen: str) -> Iterator[subprocess.Popen[str]]:
    """A running `vmctl qmp-share`."""
    with subprocess.Popen([*VMCTL, "qmp-share", source, listen], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert "sharing" in process.stderr.readline()
            yield process
        finally:
            process.terminate()

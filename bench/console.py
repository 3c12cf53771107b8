# SPDX-License-Identifier: LGPL-2.1-or-later
"""Compares the guest's console through vmspawn with QEMU's own `-serial stdio`: speed, processor time and memory.

Both boot the built-in guest. The two guests print the same bytes on request, one after the other. The time is from the
first of these bytes to the last. The manager's memory is read before and after.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from vmspawn.guest import build, builtin

ROUNDS = 5
#: The bytes that are printed in each round. An emulated serial port prints up to 100 kB/s.
SIZE = int(os.environ.get("SIZE", "500000"))
DEADLINE = 300.0
QEMU = os.environ.get("QEMU", "qemu-system-x86_64")
VMSPAWN = [sys.executable, "-m", "vmspawn.cli.spawn"]
VMCTL = [sys.executable, "-m", "vmspawn.cli.ctl"]

#: Prints lines of hexadecimal digits as od writes them. The marks are split, so that the echo of the command does not
#: contain them.
COMMAND = "printf 'be''gin>'; head -c {} /dev/zero | od -v -tx1 | head -c {}; printf '<e''nd'\n"


class Console:
    """A program that shows the guest's console on two pipes.

    The program runs in its own session, like QEMU under vmspawn, because the kernel divides processor time among
    sessions.
    """

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._stdin: IO[bytes] = self.process.stdin
        self._stdout: IO[bytes] = self.process.stdout
        self._kept = b""
        self.read_until(b"vmspawn# ")

    def read_until(self, mark: bytes) -> int:
        """Read until the mark has come; returns the number of bytes before it. Keeps the bytes after it."""
        deadline = time.monotonic() + DEADLINE
        count = 0
        while (end := self._kept.find(mark)) < 0:
            # The last bytes may be the beginning of the mark.
            done = max(0, len(self._kept) - len(mark))
            count += done
            data = os.read(self._stdout.fileno(), 65536)
            if not data or time.monotonic() > deadline:
                raise SystemExit(f"{mark!r} did not come")
            self._kept = self._kept[done:] + data
        self._kept = self._kept[end + len(mark) :]
        return count + end

    def speed(self) -> float:
        """Make the guest print; returns bytes a second."""
        self._stdin.write(COMMAND.format(SIZE // 3, SIZE).encode())
        self._stdin.flush()
        self.read_until(b"begin>")
        start = time.perf_counter()
        count = self.read_until(b"<end")
        took = time.perf_counter() - start
        self.read_until(b"vmspawn# ")
        return count / took

    def end(self) -> None:
        """Kill the program."""
        self.process.kill()
        self.process.wait()
        self._stdin.close()
        self._stdout.close()


def bare() -> Console:
    """Start QEMU with its console on its standard streams."""
    guest = builtin.find() or build.build()
    append = " ".join(("console=ttyS0", *guest.arguments))
    machine = ["-machine", "q35,accel=tcg", "-cpu", "max", "-m", "256", "-nodefaults", "-display", "none"]
    return Console(
        [QEMU, *machine, "-serial", "stdio", "-kernel", guest.kernel, "-initrd", guest.initrd, "-append", append]
    )


def through_vmspawn() -> Console:
    """Start vmspawn with the guest's console on its standard streams."""
    return Console(
        [*VMSPAWN, "-q", "-M", "bench", "--guest=builtin", "--kvm=no", "--console=interactive", f"--qemu={QEMU}"]
    )


def resident(pid: int) -> float:
    """Return a process's resident memory in MB."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    if not found:
        raise SystemExit("no VmRSS")
    return int(found[1]) / 1024


def processor_seconds(pid: int) -> float:
    """Return the processor time that a process has used, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure() -> dict[str, list[float]]:
    """Measure all figures, ROUNDS times in turn."""
    found: dict[str, list[float]] = {"bare": [], "vmspawn": [], "resident": [], "busy": []}
    consoles = {"bare": bare(), "vmspawn": through_vmspawn()}
    manager = consoles["vmspawn"].process.pid
    try:
        found["resident"].append(resident(manager))
        for _ in range(ROUNDS):
            found["bare"].append(consoles["bare"].speed())
            before, start = processor_seconds(manager), time.perf_counter()
            found["vmspawn"].append(consoles["vmspawn"].speed())
            found["busy"].append((processor_seconds(manager) - before) / (time.perf_counter() - start))
            found["resident"].append(resident(manager))
    finally:
        consoles["bare"].end()
        subprocess.run([*VMCTL, "terminate", "bench"], check=False)
        consoles["vmspawn"].process.wait(timeout=DEADLINE)
        consoles["vmspawn"].end()
    return found


def main() -> None:
    """Measure and print all figures."""
    folder = tempfile.mkdtemp(prefix="vmspawn-bench-")
    os.environ["VMSPAWN_RUNTIME_DIR"] = folder
    try:
        found = measure()
    finally:
        shutil.rmtree(folder)
    if "--json" in sys.argv:
        print(json.dumps(found))
        return
    speed = {name: statistics.median(found[name]) for name in ("bare", "vmspawn")}
    ratios = [ours / theirs for ours, theirs in zip(found["vmspawn"], found["bare"], strict=True)]
    print(f"Medians of {ROUNDS} rounds of {SIZE} bytes, in turn.\n")
    print(f"QEMU's -serial stdio to a pipe   {speed['bare'] / 1000:8.0f} kB/s")
    print(f"through vmspawn to a pipe        {speed['vmspawn'] / 1000:8.0f} kB/s")
    print(f"ratio                            {statistics.median(ratios):8.2f}   at least 0.90")
    print(f"the manager's processor          {statistics.median(found['busy']) * 100:8.0f} %")
    print(f"the manager, resident before     {found['resident'][0]:8.1f} MB")
    print(f"the manager, resident after      {found['resident'][-1]:8.1f} MB  at most 26 MB")


if __name__ == "__main__":
    main()

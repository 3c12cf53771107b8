# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measures the time to start a machine: QEMU's start, the control socket's first reply, a verb, the manager's memory.

All figures are taken in turn in one run, beside `python3 -c pass` and a bare QEMU, and printed as medians and ratios.
"""

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROUNDS = 15
DEADLINE = 30.0
QEMU = os.environ.get("QEMU", "qemu-system-x86_64")
VMSPAWN = [sys.executable, "-m", "vmspawn.cli.spawn"]
VMCTL = [sys.executable, "-m", "vmspawn.cli.ctl"]
MODULES = "import argparse, json, socket"


def seconds(command: list[str]) -> float:
    """Return the time of a whole process in seconds."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def poll(ready: Callable[[], bool]) -> float:
    """Return the time at which something is ready. A benchmark may poll without a pause, to find the exact moment."""
    deadline = time.perf_counter() + DEADLINE
    while not ready():
        if time.perf_counter() > deadline:
            raise SystemExit("nothing came up")
    return time.perf_counter()


class Machine:
    """A vmspawn that boots nothing, measured from outside."""

    def __init__(self, folder: Path, image: Path) -> None:
        self.control = folder / "bench" / "control"
        self.log = folder / "bench" / "qemu.log"
        self.start = time.perf_counter()
        command = [*VMSPAWN, "-q", "-M", "bench", f"--image={image}", "--console=headless", f"--qemu={QEMU}"]
        self.process = subprocess.Popen(command)

    def qemu_spawned(self) -> float:
        """Return the seconds until the manager has a child."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return poll(lambda: bool(children.read_text())) - self.start

    def answered(self) -> float:
        """Return the seconds until the control socket has answered a call."""
        return poll(self._describe) - self.start

    def _describe(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(self.control))
                client.sendall(b'{"method":"io.systemd.MachineInstance.Describe"}\0')
                return bool(client.recv(4096))
            except (FileNotFoundError, ConnectionRefusedError):
                return False

    def resident(self) -> float:
        """Return the manager's resident memory in MB."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise SystemExit("no VmRSS")

    def end(self) -> None:
        """End the machine."""
        subprocess.run([*VMCTL, "terminate", "bench"], check=True)
        self.process.wait(timeout=DEADLINE)


def bare_qemu(folder: Path) -> float:
    """Return the seconds until a QEMU without devices has greeted on its monitor."""
    path = folder / "bare"
    command = [QEMU, "-machine", "q35,accel=tcg", "-nodefaults", "-display", "none"]
    start = time.perf_counter()
    process = subprocess.Popen([*command, "-qmp", f"unix:{path},server=on,wait=off"])

    def greeted() -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(path))
                return bool(client.recv(10))
            except (FileNotFoundError, ConnectionRefusedError):
                return False

    took = poll(greeted) - start
    process.kill()
    process.wait()
    path.unlink(missing_ok=True)
    return took


def measure(folder: Path) -> dict[str, list[float]]:
    """Measure all figures, ROUNDS times in turn."""
    image = folder / "image"
    with open(image, "wb") as file:
        file.truncate(1 << 20)
    found: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        machine = Machine(folder, image)
        figures = {"spawned": machine.qemu_spawned(), "answered": machine.answered()}
        figures["verb"] = seconds([*VMCTL, "status", "bench"])
        figures["resident"] = machine.resident()
        machine.end()
        figures["pass"] = seconds([sys.executable, "-c", "pass"])
        figures["modules"] = seconds([sys.executable, "-c", MODULES])
        figures["bare"] = bare_qemu(folder)
        for name, figure in figures.items():
            found.setdefault(name, []).append(figure)
    return found


def main() -> None:
    """Measure and print all figures."""
    folder = Path(tempfile.mkdtemp(prefix="vmspawn-bench-"))
    os.environ["VMSPAWN_RUNTIME_DIR"] = str(folder)
    try:
        found = {name: statistics.median(figures) for name, figures in measure(folder).items()}
    finally:
        shutil.rmtree(folder)
    if "--json" in sys.argv:
        print(json.dumps(found))
        return
    rows = (
        ("python3 -c pass", f"{found['pass'] * 1000:.0f} ms", "", ""),
        (f"python3 -c '{MODULES}'", f"{found['modules'] * 1000:.0f} ms", "", ""),
        ("bare QEMU: exec to greeting", f"{found['bare'] * 1000:.0f} ms", "", ""),
        ("vmspawn: command to QEMU spawned", f"{found['spawned'] * 1000:.0f} ms", ratio(found, "spawned", "pass"), ""),
        (
            "vmspawn: command to first answer",
            f"{found['answered'] * 1000:.0f} ms",
            ratio(found, "answered", "bare"),
            "200 ms",
        ),
        ("vmctl status", f"{found['verb'] * 1000:.0f} ms", ratio(found, "verb", "modules"), "3.00 x modules"),
        ("the manager, resident", f"{found['resident']:.1f} MB", "", "26 MB"),
    )
    print(f"Medians of {ROUNDS} rounds.\n")
    for name, figure, relation, target in rows:
        print(f"{name:<46} {figure:>9}  {relation:<18} {'at most ' + target if target else ''}".rstrip())


def ratio(found: dict[str, float], name: str, base: str) -> str:
    """Return a figure as a multiple of another."""
    names = {"pass": "pass", "modules": "modules", "bare": "bare QEMU"}
    return f"{found[name] / found[base]:.2f} x {names[base]}"


if __name__ == "__main__":
    main()

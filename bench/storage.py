# SPDX-License-Identifier: LGPL-2.1-or-later
"""Compares the time to attach and detach disks with the same QMP commands from a minimal client of the same QEMU.

A `vmspawn` process runs the built-in guest, and is called through its control socket. Its QEMU has another monitor for
the raw client. vmspawn and the raw client take turns, and the next turn begins when the guest has noticed all disks of
the last. A ratio is vmspawn ÷ raw, of medians.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vmspawn.control.client import Client
from vmspawn.host import runtime

QEMU = os.environ.get("QEMU", "qemu-system-x86_64")

#: The number of attaches of one disk, for vmspawn and for the raw client each.
ROUNDS = 50
#: The number of disks in the measurement of many disks, and the number of its rounds.
MANY = 100
MANY_ROUNDS = 8
#: The number of boots of each of the two machines that are compared.
BOOTS = 9
SIZE = 1 << 20
DEADLINE = 60.0
READY = b"vmspawn-guest: ready"


class Row(NamedTuple):
    """A line of the table."""

    what: str
    figure: str
    target: str = ""


class Console:
    """The guest's console. Owns its socket."""

    def __init__(self, machine: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE)
        self.socket.connect(os.path.join(runtime.runtime_root(), machine, runtime.CONSOLE))
        self._text = b""

    def wait_for(self, text: bytes, count: int = 1) -> None:
        """Wait until a text was printed `count` times since the last wait."""
        while self._text.count(text) < count:
            data = self.socket.recv(1 << 16)
            if not data:
                raise SystemExit("the console ended")
            self._text += data
        self._text = b""


class Raw:
    """A bare QMP client that attaches disks as vmspawn does. Owns its socket."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE)
        self.socket.connect(str(path))
        self._buffer = b""
        self._number = 0
        self._message()
        self.execute({"execute": "qmp_capabilities"})

    def execute(self, command: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        """Run a command."""
        data = json.dumps(command, separators=(",", ":")).encode()
        socket.send_fds(self.socket, [data], fds)
        while "event" in (message := self._message()):
            pass
        if "error" in message:
            raise SystemExit(f"{command}: {message}")

    def _message(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            self._buffer += self.socket.recv(1 << 16)
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def attach(self, bus: str, path: str, target: int = 255) -> None:
        """Send the commands that vmspawn sends for a raw image."""
        self._number += 1
        name, fdset = f"raw{self._number}", 2_000_000 + self._number
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._run("add-fd", {"fdset-id": fdset}, (fd,))
        os.close(fd)
        file: dict[str, Any] = {"driver": "file", "filename": f"/dev/fdset/{fdset}", "node-name": f"{name}-file"}
        self._run("object-add", {"qom-type": "throttle-group", "id": f"{name}-limits"})
        self._run("blockdev-add", {**file, "discard": "unmap"})
        pivot = {"driver": "throttle", "throttle-group": f"{name}-limits", "file": f"{name}-file", "node-name": name}
        self._run("blockdev-add", {**pivot, "discard": "unmap"})
        place: dict[str, Any] = {"driver": "virtio-blk-pci", "bus": "port7", "addr": "0x0"}
        if bus == "virtio-scsi":
            place = {"driver": "scsi-hd", "bus": "scsi0.0", "scsi-id": target, "lun": 0}
        self._run("device_add", {"id": name, "drive": name, "serial": name, **place})
        self._run("remove-fd", {"fdset-id": fdset})

    def detach(self, number: int | None = None) -> None:
        """Unplug a disk, by default the last one; wait for DEVICE_DELETED, and remove the disk's nodes and objects."""
        name = f"raw{number or self._number}"
        self.socket.sendall(json.dumps({"execute": "device_del", "arguments": {"id": name}}).encode())
        while (self._message().get("data") or {}).get("device") != name:
            pass
        for node in (name, f"{name}-file"):
            self._run("blockdev-del", {"node-name": node})
        self._run("object-del", {"id": f"{name}-limits"})

    def last(self, count: int) -> range:
        """Return the numbers of the disks that were attached last."""
        return range(self._number - count + 1, self._number + 1)

    def _run(self, command: str, arguments: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        self.execute({"execute": command, "arguments": arguments}, fds)


class Machine(NamedTuple):
    """A running machine: functions that attach and detach through vmspawn, the raw client, and the console."""

    attach: Callable[[str, str, str], None]
    detach: Callable[[str], None]
    raw: Raw
    console: Console


# The machine.


@contextlib.contextmanager
def machine(folder: Path) -> Iterator[Machine]:
    """Run a machine under a `vmspawn` of its own."""
    command = [sys.executable, "-m", "vmspawn.cli.spawn", "-q", "-M", "control", "--guest=builtin"]
    command += ["--console=headless", f"--qemu={QEMU}", *(f"--qemu-arg={each}" for each in monitor(folder))]
    process = subprocess.Popen(command)
    try:
        wait_for(Path(runtime.runtime_root()) / "control" / runtime.CONSOLE)
        with Client("control") as client, connected(folder, "control") as (raw, console):

            def detach(name: str) -> None:
                client.call("io.vmspawn.Machine.DetachStorage", {"name": name})

            yield Machine(functools.partial(attach, client), detach, raw, console)
    finally:
        # QEMU would survive a manager that is killed.
        subprocess.run([sys.executable, "-m", "vmspawn.cli.ctl", "terminate", "control"], check=False)
        process.wait(DEADLINE)


def attach(client: Client, bus: str, name: str, path: str) -> None:
    """Attach a disk as a library client does."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    parameters = {"name": name, "bus": bus, "fileDescriptorIndex": 0}
    client.call("io.vmspawn.Machine.AttachStorage", parameters, fds=[fd])
    os.close(fd)


def monitor(folder: Path) -> tuple[str, str]:
    """Return the options of the raw client's monitor."""
    return ("-qmp", f"unix:{folder}/raw,server=on,wait=off")


@contextlib.contextmanager
def connected(folder: Path, name: str) -> Iterator[tuple[Raw, Console]]:
    """Yield the raw client and the console of a machine whose guest is up."""
    console = Console(name)
    with console.socket:
        console.wait_for(READY)
        raw = Raw(folder / "raw")
        with raw.socket:
            yield raw, console


def wait_for(path: Path) -> None:
    """Wait until a socket exists."""
    deadline = time.monotonic() + DEADLINE
    while not path.exists():
        if time.monotonic() > deadline:
            raise SystemExit(f"{path} did not come up")
        time.sleep(0.01)


# The measurements.


def seconds(function: Callable[..., object], *arguments: object) -> float:
    """Return the seconds of a call."""
    begin = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - begin


class Times(NamedTuple):
    """The medians of vmspawn and of the raw client, in seconds."""

    attach: float
    raw_attach: float
    detach: float
    raw_detach: float


def one_disk(machine: Machine, bus: str, path: str) -> Times:
    """Attach and detach one disk through vmspawn and the raw client in turn. Each begins half of the rounds."""
    attaches: dict[bool, list[float]] = {True: [], False: []}
    detaches: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(2 * ROUNDS):
        ours = turn % 4 in (0, 3)
        if ours:
            attaches[ours].append(seconds(machine.attach, bus, "disk", path))
        else:
            attaches[ours].append(seconds(machine.raw.attach, bus, path))
        machine.console.wait_for(b" came: ")
        detaches[ours].append(seconds(machine.detach, "disk") if ours else seconds(machine.raw.detach))
        machine.console.wait_for(b" went")
    return Times(*(statistics.median(each[ours]) for each in (attaches, detaches) for ours in (True, False)))


def many_disks(machine: Machine, folder: Path) -> tuple[float, float]:
    """Attach MANY SCSI disks through vmspawn and the raw client in turn; returns the seconds until the last reply."""
    paths = [image(folder, f"disk{number}") for number in range(MANY)]
    found: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(2 * MANY_ROUNDS):
        ours = turn % 4 in (0, 3)
        begin = time.perf_counter()
        for number, path in enumerate(paths):
            if ours:
                machine.attach("virtio-scsi", f"disk{number}", path)
            else:
                machine.raw.attach("virtio-scsi", path, number)
        found[ours].append(time.perf_counter() - begin)
        machine.console.wait_for(b" came: ", MANY)
        for number in range(MANY) if ours else machine.raw.last(MANY):
            if ours:
                machine.detach(f"disk{number}")
            else:
                machine.raw.detach(number)
        machine.console.wait_for(b" went", MANY)
    return statistics.median(found[True]), statistics.median(found[False])


def journal_entry(count: int) -> float:
    """Return the seconds to write a journal of `count` disks as the manager does: new file, fsync, rename."""
    content = b"x" * 700 * count
    directory = runtime.MachineDirectory.create("journal")
    try:
        return statistics.median(seconds(directory.write, runtime.STATE, content) for _ in range(200))
    finally:
        directory.remove()


def boot(qemu_path: str, *options: str) -> float:
    """Return the seconds from the start of `vmspawn` until the guest is up."""
    command = [sys.executable, "-m", "vmspawn.cli.spawn", "-q", "-M", "boot", "--guest=builtin", "--console=headless"]
    begin = time.perf_counter()
    process = subprocess.Popen([*command, f"--qemu={qemu_path}", *options])
    try:
        wait_for(Path(runtime.runtime_root()) / "boot" / runtime.CONSOLE)
        with (console := Console("boot")).socket:
            console.wait_for(READY)
        took = time.perf_counter() - begin
        with Client("boot") as client:
            client.call("io.systemd.MachineInstance.Terminate")
        return took
    finally:
        process.wait(DEADLINE)


def image(folder: Path, name: str) -> str:
    """Make a raw image."""
    path = folder / name
    with open(path, "wb") as file:
        file.truncate(SIZE)
    return str(path)


# The table.


def rows(folder: Path) -> Iterator[Row]:
    """Measure and yield the lines of the table."""
    with machine(folder) as opened:
        for bus in ("virtio-scsi", "virtio-blk"):
            times = one_disk(opened, bus, image(folder, "disk"))
            yield ratio(f"attach {bus}", times.attach, times.raw_attach, "≤ 1.30")
            yield ratio(f"detach {bus}", times.detach, times.raw_detach, "≤ 1.05")
        yield ratio(f"attach {MANY} SCSI disks", *many_disks(opened, folder), "≤ 1.20")
    for count in (1, MANY):
        yield Row(
            f"an entry in a journal of {count} disks; an attach makes one", f"{journal_entry(count) * 1e6:.0f} µs"
        )
    yield from boots()


def boots() -> Iterator[Row]:
    """Yield the cost of hot-plug ports at boot."""
    figures: dict[int, list[float]] = {0: [], 8: []}
    for _ in range(BOOTS):
        for ports, found in figures.items():
            found.append(boot(QEMU, f"--hotplug-ports={ports}"))
    yield ratio("boot with 8 ports ÷ with none", statistics.median(figures[8]), statistics.median(figures[0]), "≤ 1.12")


def ratio(name: str, ours: float, raw: float, target: str) -> Row:
    """Return the ratio of two medians as a line of the table."""
    return Row(f"{name} ({ours * 1000:.2f} ÷ {raw * 1000:.2f} ms)", f"{ours / raw:.2f}", target)


def main() -> None:
    """Measure and print all figures."""
    print(f"{'disks, vmspawn ÷ raw client':<66}{'measured':>10}  target", flush=True)
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="vmspawn-bench-", dir=base) as name:
        # As in normal use, the runtime directory is on a file system in memory.
        os.environ["VMSPAWN_RUNTIME_DIR"] = str(Path(name) / "run")
        for row in rows(Path(name)):
            print(f"{row.what:<66}{row.figure:>10}  {row.target}".rstrip(), flush=True)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""How quick disks come and go, beside the same QMP commands sent to the same QEMU by a client that does nothing else.

A machine of a `vmspawn` process with the built-in guest, asked through its control socket; its QEMU has a monitor more,
for the raw client. Ours and raw take turns, and the next turn begins when the guest has seen all of the last. A ratio
is ours ÷ raw, of medians.
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

#: Attaches of one disk, ours and raw each.
ROUNDS = 50
#: Disks of the measurement of many, and how often it is done.
MANY = 100
MANY_ROUNDS = 8
#: Boots of each of two machines that are compared.
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
    """What the guest prints. Owns its socket."""

    def __init__(self, machine: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE)
        self.socket.connect(os.path.join(runtime.runtime_root(), machine, runtime.CONSOLE))
        self._text = b""

    def wait_for(self, text: bytes, count: int = 1) -> None:
        """Wait until it has been printed so many times since the last wait."""
        while self._text.count(text) < count:
            data = self.socket.recv(1 << 16)
            if not data:
                raise SystemExit("the console ended")
            self._text += data
        self._text = b""


class Raw:
    """A bare QMP client that attaches disks as we do. Owns its socket."""

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
        """The commands that `vmspawn` sends for a raw image."""
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
        """Unplug a disk, the last one unless another is said, wait for DEVICE_DELETED and delete what it stood on."""
        name = f"raw{number or self._number}"
        self.socket.sendall(json.dumps({"execute": "device_del", "arguments": {"id": name}}).encode())
        while (self._message().get("data") or {}).get("device") != name:
            pass
        for node in (name, f"{name}-file"):
            self._run("blockdev-del", {"node-name": node})
        self._run("object-del", {"id": f"{name}-limits"})

    def last(self, count: int) -> range:
        """The numbers of the disks that were attached last."""
        return range(self._number - count + 1, self._number + 1)

    def _run(self, command: str, arguments: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        self.execute({"execute": command, "arguments": arguments}, fds)


class Side(NamedTuple):
    """A machine, our way to attach and detach there, and the raw one."""

    attach: Callable[[str, str, str], None]
    detach: Callable[[str], None]
    raw: Raw
    console: Console


# The machine.


@contextlib.contextmanager
def machine(folder: Path) -> Iterator[Side]:
    """A machine of a `vmspawn` of its own."""
    command = [sys.executable, "-m", "vmspawn.cli.spawn", "-q", "-M", "control", "--guest=builtin"]
    command += ["--console=headless", f"--qemu={QEMU}", *(f"--qemu-arg={each}" for each in monitor(folder))]
    process = subprocess.Popen(command)
    try:
        wait_for(Path(runtime.runtime_root()) / "control" / runtime.CONTROL)
        with Client("control") as client, side(folder, "control") as (raw, console):

            def detach(name: str) -> None:
                client.call("io.vmspawn.Machine.DetachStorage", {"name": name})

            yield Side(functools.partial(attach, client), detach, raw, console)
    finally:
        # A manager that is killed would leave its QEMU running.
        subprocess.run([sys.executable, "-m", "vmspawn.cli.ctl", "terminate", "control"], check=False)
        process.wait(DEADLINE)


def attach(client: Client, bus: str, name: str, path: str) -> None:
    """Attach a disk as a program does."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    parameters = {"name": name, "bus": bus, "fileDescriptorIndex": 0}
    client.call("io.vmspawn.Machine.AttachStorage", parameters, fds=[fd])
    os.close(fd)


def monitor(folder: Path) -> tuple[str, str]:
    """The options of the monitor that the raw client uses."""
    return ("-qmp", f"unix:{folder}/raw,server=on,wait=off")


@contextlib.contextmanager
def side(folder: Path, name: str) -> Iterator[tuple[Raw, Console]]:
    """The raw client and the console of a machine whose guest is up."""
    console = Console(name)
    with console.socket:
        console.wait_for(READY)
        raw = Raw(folder / "raw")
        with raw.socket:
            yield raw, console


def wait_for(path: Path) -> None:
    """Wait until a socket is there."""
    deadline = time.monotonic() + DEADLINE
    while not path.exists():
        if time.monotonic() > deadline:
            raise SystemExit(f"{path} did not come up")
        time.sleep(0.01)


# What is measured.


def seconds(function: Callable[..., object], *arguments: object) -> float:
    """How long a call takes."""
    begin = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - begin


class Times(NamedTuple):
    """Medians of ours and raw, in seconds."""

    attach: float
    raw_attach: float
    detach: float
    raw_detach: float


def one_disk(machine: Side, bus: str, path: str) -> Times:
    """Attach and detach one disk, ours and raw in turn, and each first in half of the rounds."""
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


def many_disks(machine: Side, folder: Path) -> tuple[float, float]:
    """Attach MANY SCSI disks one after the other, ours and raw in turn; seconds until the last reply."""
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
    """Seconds to write a journal of so many disks as the manager does: to a new file, fsync, rename."""
    content = b"x" * 700 * count
    directory = runtime.MachineDirectory.create("journal")
    try:
        return statistics.median(seconds(directory.write, runtime.STATE, content) for _ in range(200))
    finally:
        directory.remove()


def boot(qemu_path: str, *options: str) -> float:
    """Seconds from the start of `vmspawn` until the guest is up."""
    command = [sys.executable, "-m", "vmspawn.cli.spawn", "-q", "-M", "boot", "--guest=builtin", "--console=headless"]
    begin = time.perf_counter()
    process = subprocess.Popen([*command, f"--qemu={qemu_path}", *options])
    try:
        wait_for(Path(runtime.runtime_root()) / "boot" / runtime.CONTROL)
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
    """Measure, line by line."""
    with machine(folder) as opened:
        for bus in ("virtio-scsi", "virtio-blk"):
            times = one_disk(opened, bus, image(folder, "disk"))
            yield ratio(f"attach {bus}", times.attach, times.raw_attach, "≤ 1.30")
            yield ratio(f"detach {bus}", times.detach, times.raw_detach, "≤ 1.05")
        yield ratio(f"attach {MANY} SCSI disks", *many_disks(opened, folder), "≤ 1.20")
    for count in (1, MANY):
        yield Row(
            f"an entry in a journal of {count} disks; an attach makes one", f"{journal_entry(count) * 1e6:.0f} us"
        )
    yield from boots()


def boots() -> Iterator[Row]:
    """What the ports cost at boot."""
    figures: dict[int, list[float]] = {0: [], 8: []}
    for _ in range(BOOTS):
        for ports, found in figures.items():
            found.append(boot(QEMU, f"--hotplug-ports={ports}"))
    yield ratio("boot with 8 ports ÷ with none", statistics.median(figures[8]), statistics.median(figures[0]), "≤ 1.12")


def ratio(name: str, ours: float, raw: float, target: str) -> Row:
    """Two medians as a line."""
    return Row(f"{name} ({ours * 1000:.2f} ÷ {raw * 1000:.2f} ms)", f"{ours / raw:.2f}", target)


def main() -> None:
    """Measure and print."""
    print(f"{'disks, ours ÷ raw':<66}{'measured':>10}  target", flush=True)
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="vmspawn-bench-", dir=base) as name:
        # As in life, the runtime directory is on a file system in memory.
        os.environ["VMSPAWN_RUNTIME_DIR"] = str(Path(name) / "run")
        for row in rows(Path(name)):
            print(f"{row.what:<66}{row.figure:>10}  {row.target}".rstrip(), flush=True)


if __name__ == "__main__":
    main()

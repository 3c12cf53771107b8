# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measures the time of commands in the guest and the speed of their streams, in the built-in guest under TCG.

A loop in the guest's shell measures the guest's part of the time of `machine.run("true")`. A command's stream is
compared with a raw virtio-serial port of the same machine, and `vmctl exec` with `vmctl status`. A boot with the
virtio-serial controller for commands is compared with a boot without it. Each comparison alternates between its two
sides. Other load on the host changes QEMU's processor time less than the time by the clock.
"""

import asyncio
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import vmspawn
from vmspawn.boot.console import COMMAND_NUMBERS, CONTROLLER

ROUNDS = 40
MIB = 1 << 20
#: Bytes that `dd` writes at once, and its number of writes: 100 MB.
BLOCK = 32 << 10
COUNT = int(os.environ.get("SIZE", "100000000")) // BLOCK
#: Seconds until a stream that stands still counts as an error.
STREAM_TIMEOUT = 60
#: Streams of each kind, after one of each that warms the machine up: TCG translates the code of the guest.
STREAMS = int(os.environ.get("STREAMS", "7"))
QEMU = os.environ.get("QEMU", "qemu-system-x86_64")
#: The number of pairs of boots, one with the controller for commands and one without.
PAIRS = int(os.environ.get("PAIRS", "12"))
VMSPAWN = [sys.executable, "-m", "vmspawn.cli.spawn"]
VMCTL = [sys.executable, "-m", "vmspawn.cli.ctl"]
#: Seconds between commands, in which the ports of the last command become free.
PAUSE = 0.3


def show(what: str, times: list[float]) -> float:
    """Print the median of `times` in milliseconds; returns it in seconds."""
    ordered = sorted(times)
    p50, p90 = statistics.median(ordered), ordered[len(ordered) * 9 // 10]
    print(f"  {what:<44} p50 {p50 * 1000:7.1f} ms   p90 {p90 * 1000:7.1f} ms")
    return p50


async def one(machine: vmspawn.Machine, *, pause: float) -> list[float]:
    """Return the durations of `true` in the guest."""
    times = []
    for _ in range(ROUNDS):
        await asyncio.sleep(pause)
        start = time.perf_counter()
        await machine.run(["true"], check=True)
        times.append(time.perf_counter() - start)
    return times


async def guests_own(machine: vmspawn.Machine) -> float:
    """Return the seconds that the guest needs to fork and execute `true`, measured by a loop of its shell."""
    count = 50
    script = f"i=0; while [ $i -lt {count} ]; do /bin/busybox true; i=$((i + 1)); done"
    times = []
    for _ in range(5):
        start = time.perf_counter()
        await machine.run(script, check=True)
        times.append((time.perf_counter() - start) / count)
    return statistics.median(times)


def commands(name: str) -> None:
    """Run `vmctl exec` and `vmctl status` in turn, and compare them."""
    found: dict[str, list[float]] = {"exec": [], "status": []}
    for verb, *arguments in [("exec", "true"), ("status",)] * (ROUNDS // 2):
        time.sleep(PAUSE)
        start = time.perf_counter()
        subprocess.run([*VMCTL, verb, name, *arguments], stdout=subprocess.DEVNULL, check=True)
        found[verb].append(time.perf_counter() - start)
    execute, status = (show(f"vmctl {verb}", times) for verb, times in found.items())
    print(f"  vmctl exec … true ÷ vmctl status             {execute / status:.2f}")


def processor_time(pid: int) -> float:
    """Return the seconds of processor time that the threads of a process have used."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


async def plug_raw(machine: vmspawn.Machine, path: str) -> tuple[socket.socket, str]:
    """Plug a port into the controller for commands; return its socket and its device in the guest."""
    address = {"type": "unix", "data": {"path": path}}
    backend = {"type": "socket", "data": {"addr": address, "server": True, "wait": False}}
    device = {"driver": "virtserialport", "id": "raw", "chardev": "raw", "name": "raw", "bus": f"{CONTROLLER}.0"}
    async with machine.qmp() as qmp:
        await qmp.execute("chardev-add", {"id": "raw", "backend": backend})
        await qmp.execute("device_add", {**device, "nr": COMMAND_NUMBERS.stop - 1})
    port = socket.socket(socket.AF_UNIX)
    port.settimeout(STREAM_TIMEOUT)
    port.connect(path)
    find = "cd /sys/class/virtio-ports; until grep -lx raw */name; do :; done"
    found = (await machine.run(find, check=True, timeout=STREAM_TIMEOUT)).stdout
    return port, f"/dev/{found.partition('/')[0]}"


def read_raw(port: socket.socket) -> float:
    """Read all that the guest's `dd` writes; return the bytes a second, from the first bytes on."""
    first = total = len(port.recv(MIB))
    start = time.perf_counter()
    while total < COUNT * BLOCK:
        data = port.recv(MIB)
        assert data, "QEMU has closed the port"
        total += len(data)
    return (total - first) / (time.perf_counter() - start)


async def raw(machine: vmspawn.Machine, port: socket.socket, device: str) -> float:
    """Return the bytes a second of the raw port, which a thread reads from a blocking socket."""
    write = ["dd", "if=/dev/zero", f"of={device}", f"bs={BLOCK}", f"count={COUNT}"]
    reading = asyncio.create_task(asyncio.to_thread(read_raw, port))
    await machine.run(write, check=True, timeout=STREAM_TIMEOUT)
    return await reading


async def stream(machine: vmspawn.Machine) -> float:
    """Return the bytes a second of a command's output, from the first bytes on."""
    write = ["dd", "if=/dev/zero", f"bs={BLOCK}", f"count={COUNT}"]
    async with await machine.execute(write, stdin=False) as command:
        assert command.stdout is not None
        first = total = len(await command.stdout.read(MIB))
        start = time.perf_counter()
        while data := await command.stdout.read(MIB):
            total += len(data)
        elapsed = time.perf_counter() - start
        assert total == COUNT * BLOCK
        await command.wait()
    return (total - first) / elapsed


async def streams(machine: vmspawn.Machine) -> None:
    """Compare a command's output with a raw port, in turn."""
    rates: dict[str, list[float]] = {"raw": [], "ours": []}
    processor: dict[str, list[float]] = {"raw": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder:
        port, device = await plug_raw(machine, f"{folder}/raw")
        with port:
            for number in range(STREAMS + 1):
                for side in rates:
                    before = processor_time(machine.pid)
                    rate = await (stream(machine) if side == "ours" else raw(machine, port, device))
                    if number:
                        rates[side].append(rate)
                        processor[side].append(processor_time(machine.pid) - before)
    ours, beside = statistics.median(rates["ours"]), statistics.median(rates["raw"])
    by_time = statistics.median(processor["raw"]) / statistics.median(processor["ours"])
    print(f"stdout, medians of {STREAMS} rounds: {ours / 1e6:.1f} MB/s, a raw port {beside / 1e6:.1f} MB/s")
    print(f"  ratio by the clock {ours / beside:.2f}, by the processor time of QEMU {by_time:.2f}")


async def main() -> None:
    """Measure and print all figures of one machine."""
    async with vmspawn.Machine(guest="builtin", qemu=QEMU, name=f"bench-{os.getpid()}", console="headless") as machine:
        await machine.run("true")
        print("one command, built-in guest, TCG")
        whole = show('machine.run("true"), after a pause', await one(machine, pause=PAUSE))
        show('machine.run("true"), one after the other', await one(machine, pause=0))
        guest = await guests_own(machine)
        print(f"  of these, fork and exec in the guest              {guest * 1000:7.1f} ms")
        print(f"  and all else                                      {(whole - guest) * 1000:7.1f} ms")
        await streams(machine)


def main_of_commands() -> None:
    """Measure `vmctl exec`, which needs a manager of its own."""
    name = f"bench-{os.getpid()}"
    command = [*VMSPAWN, "--guest=builtin", f"--qemu={QEMU}", "-M", name, "-q"]
    process = subprocess.Popen([*command, "--console=headless"], stdin=subprocess.DEVNULL)
    try:
        while subprocess.run([*VMCTL, "exec", name, "true"], capture_output=True).returncode:
            assert process.poll() is None
            time.sleep(0.2)
        commands(name)
    finally:
        subprocess.run([*VMCTL, "terminate", name])
        process.wait()


def qemu_of(manager: int) -> int:
    """Return the process id of the QEMU that a manager has started."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            name, _, fields = stat.read_text().rpartition(")")
            if int(fields.split()[1]) == manager and "(vmspawn-qemu" in name:
                return int(stat.parent.name)
    raise AssertionError("the manager has no QEMU")


def boot(agent: str) -> tuple[float, float]:
    """Return the seconds until the guest's shell prompts, and QEMU's processor time until then."""
    name = f"bench-{os.getpid()}"
    command = [*VMSPAWN, "-M", name, "--guest=builtin", f"--qemu={QEMU}", "-q", f"--agent={agent}"]
    start = time.perf_counter()
    with subprocess.Popen(
        [*command, "--console=read-only"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        output = b""
        while b"vmspawn# " not in output:
            data = os.read(process.stdout.fileno(), 65536)
            assert data, output
            output += data
        elapsed = time.perf_counter() - start
        processor = processor_time(qemu_of(process.pid))
        subprocess.run([*VMCTL, "terminate", name], check=True)
    return elapsed, processor


def boots() -> None:
    """Boot with and without the controller for commands in turn, and compare the times.

    The two boots of a pair run one after the other, so both meet the same load. The median of their ratios is steadier
    than the ratio of two medians.
    """
    ratios: list[tuple[float, float]] = []
    for number in range(PAIRS):
        order = ("yes", "no") if number % 2 else ("no", "yes")
        found = {agent: boot(agent) for agent in order}
        ratios.append((found["yes"][0] / found["no"][0], found["yes"][1] / found["no"][1]))
    for what, each in zip(("by the clock", "processor time of QEMU"), zip(*ratios, strict=True), strict=True):
        low, middle, high = statistics.quantiles(each, n=4)
        print(f"boot with the controller ÷ without, {what}: {middle:.3f} ({low:.3f}-{high:.3f}), {PAIRS} pairs")


if __name__ == "__main__":
    asyncio.run(main())
    main_of_commands()
    boots()

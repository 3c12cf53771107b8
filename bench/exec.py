# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measures the time of commands in the guest and the speed of their streams, in the built-in guest under TCG.

A loop of the guest's shell splits the time of `machine.run("true")` into the host's part and the guest's. A command's
stream is compared with a raw virtio-serial port, `vmctl exec` with `vmctl status`.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import vmspawn
from tests.guest.agent_host import booted

ROUNDS = 40
MIB = 1 << 20
#: Bytes of output.
SIZE = int(os.environ.get("SIZE", str(100 * 1000 * 1000)))
QEMU = os.environ.get("QEMU", "qemu-system-x86_64")
#: The number of pairs of boots, one with the controller for commands and one without.
PAIRS = int(os.environ.get("PAIRS", "8"))
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


async def stream(machine: vmspawn.Machine) -> float:
    """Return the bytes a second of a command's output."""
    start = time.perf_counter()
    async with await machine.execute(
        ["dd", "if=/dev/zero", "bs=32k", f"count={SIZE // 32768}"], stdin=False
    ) as command:
        assert command.stdout is not None
        total = 0
        while data := await command.stdout.read(MIB):
            total += len(data)
        await command.wait()
    return total / (time.perf_counter() - start)


def raw(folder: Path) -> float:
    """Return the bytes a second of a raw port, which the guest's dd writes and this program reads."""
    with booted(QEMU, folder) as machine:
        port, number = machine.plug("raw", "raw", "stdout")
        machine.plugged()
        write = f"dd if=/dev/zero of=/dev/${{p##*/}} bs=32k count={SIZE // 32768}"
        find = "for p in /sys/class/virtio-ports/*; do read -r n <$p/name; case $n in *raw.stdout)"
        script = f"{find} {write} ;; esac; done"
        command = machine.start("sh", "-c", script)
        size, total = SIZE // 32768 * 32768, 0
        port.settimeout(60)
        total = len(port.recv(MIB))
        start = time.perf_counter()
        while total < size:
            total += len(port.recv(MIB))
        elapsed = time.perf_counter() - start
        command.end()
        assert number
    return size / elapsed


async def main() -> None:
    """Measure and print all figures."""
    with tempfile.TemporaryDirectory() as folder:
        beside = raw(Path(folder))
    async with vmspawn.Machine(guest="builtin", qemu=QEMU, name=f"bench-{os.getpid()}", console="headless") as machine:
        await machine.run("true")
        print("one command, built-in guest, TCG")
        whole = show('machine.run("true"), after a pause', await one(machine, pause=PAUSE))
        show('machine.run("true"), one after the other', await one(machine, pause=0))
        guest = await guests_own(machine)
        print(f"  of these, fork and exec in the guest              {guest * 1000:7.1f} ms")
        print(f"  and all else                                      {(whole - guest) * 1000:7.1f} ms")
        ours = await stream(machine)
        print(f"stdout: {ours / 1e6:.1f} MB/s, a raw port {beside / 1e6:.1f} MB/s, ratio {ours / beside:.2f}")


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
        described = subprocess.run([*VMCTL, "status", name, "--json=short"], capture_output=True, check=True).stdout
        fields = Path(f"/proc/{json.loads(described)['processId']}/stat").read_text().rpartition(")")[2].split()
        subprocess.run([*VMCTL, "terminate", name], check=True)
    return elapsed, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def boots() -> None:
    """Boot with and without the controller for commands in turn, and compare the times."""
    found: dict[str, list[tuple[float, float]]] = {"yes": [], "no": []}
    for number in range(PAIRS):
        for agent in ("yes", "no") if number % 2 else ("no", "yes"):
            found[agent].append(boot(agent))
    for index, what in enumerate(("by the clock", "processor time of QEMU")):
        with_it, without = (statistics.median(each[index] for each in found[agent]) for agent in ("yes", "no"))
        print(f"boot with the controller ÷ without, {what}: {with_it / without:.3f}, {PAIRS} pairs")


if __name__ == "__main__":
    asyncio.run(main())
    main_of_commands()
    boots()

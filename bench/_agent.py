# SPDX-License-Identifier: LGPL-2.1-or-later
"""Splits the time of a command in the guest into the host's part and the guest's: `python -m bench._agent [AGENT]`.

It measures the built-in guest under TCG. With a pause between the ports and the message, the figures show the time of
the message alone.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.guest.agent_host import AgentMachine, Command, booted
from vmspawn.agent import protocol
from vmspawn.agent.protocol import Run, Started

ROUNDS = 60

#: busybox's own `true`, and not the shell's.
TRUE = (b"/bin/busybox", b"true")
MIB = 1 << 20


def one(machine: AgentMachine, number: int, pause: float) -> dict[str, float]:
    """Run `true` once. During the pause the guest finishes its work with the ports, before the message comes."""
    id = f"b{number}-{int(pause * 1000)}"
    run = Run(id, machine.session, id, TRUE)
    start = time.perf_counter()
    command = Command(machine, run)
    plugged = time.perf_counter()
    time.sleep(pause)
    sent = time.perf_counter()
    machine.send(protocol.run(run))
    command.wait(Started)
    started = time.perf_counter()
    command.end()
    ended = time.perf_counter()
    command.unplug()
    return {
        "plug the ports (QMP)": plugged - start,
        "message to started": started - sent,
        "message to the end": ended - sent,
        "whole, without the pause": ended - start - (sent - plugged),
        "unplug the ports": time.perf_counter() - ended,
    }


def table(machine: AgentMachine, pause: float) -> None:
    """Print the median and the 90th percentile of each stage."""
    rounds = [one(machine, number, pause) for number in range(ROUNDS)]
    print(f"pause {pause * 1000:.0f} ms")
    for name in rounds[0]:
        figures = sorted(each[name] * 1000 for each in rounds)
        print(f"  {name:<28} p50 {statistics.median(figures):6.1f} ms   p90 {figures[len(figures) * 9 // 10]:6.1f} ms")


def at_once(machine: AgentMachine) -> None:
    """Print the median time of commands whose message is sent before the ports exist."""
    times = []
    for number in range(ROUNDS):
        run = Run(f"a{number}", machine.session, f"a{number}", TRUE)
        start = time.perf_counter()
        machine.send(protocol.run(run))
        command = Command(machine, run)
        command.end()
        times.append(time.perf_counter() - start)
        command.unplug()
    print(f"message before the ports: p50 {statistics.median(times) * 1000:.1f} ms")


def guests_own(machine: AgentMachine) -> float:
    """Return the milliseconds that the guest needs to fork and execute `true`, measured by a loop of its shell."""
    script = "for i in 0 1 2 3 4 5 6 7 8 9; do /bin/busybox true; done; read a b </proc/uptime; echo $a"
    times = []
    for _ in range(5):
        before = time.perf_counter()
        machine.run("sh", "-c", "read a b </proc/uptime; echo $a")
        middle = time.perf_counter()
        machine.run("sh", "-c", script)
        times.append(time.perf_counter() - middle - (middle - before))
    return statistics.median(times) * 100


def throughput(machine: AgentMachine) -> None:
    """Print the time of a command's streams."""
    start = time.perf_counter()
    assert len(machine.run("cat", data=bytes(4 * MIB)).stdout) == 4 * MIB
    print(f"4 MiB in and out: {(time.perf_counter() - start) * 1000:.0f} ms")
    start = time.perf_counter()
    assert len(machine.run("dd", "if=/dev/zero", "bs=32k", "count=1600").stdout) == 50 * MIB
    print(f"50 MiB out: {(time.perf_counter() - start) * 1000:.0f} ms")


def main() -> None:
    """Measure and print all figures."""
    agent = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory() as folder, booted("qemu-system-x86_64", Path(folder), agent=agent) as machine:
        time.sleep(1)
        for pause in (0.0, 0.1):
            table(machine, pause)
        at_once(machine)
        if agent:
            return
        print(f"fork and exec in the guest: {guests_own(machine):.1f} ms")
        throughput(machine)


if __name__ == "__main__":
    main()

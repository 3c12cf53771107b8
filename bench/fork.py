# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measures the time to start a copy of a running machine, beside a boot of the same machine.

All figures are taken in turn in one run, with the built-in guest: a boot and a copy, each until a command in the guest
has ended; the pause of a save, beside cp(1) of its state; a copy until QEMU runs, beside a bare QEMU; twenty copies.
"""

import asyncio
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from vmspawn import Machine, Snapshot

ROUNDS = 5
COPIES = 20
QEMU = os.environ.get("QEMU", "qemu-system-x86_64")


async def booted() -> float:
    """Return the seconds from the start until a command in the guest has ended."""
    begun = time.perf_counter()
    async with Machine(guest="builtin", qemu=QEMU, name="bench-boot", console="headless") as machine:
        await machine.run("true", check=True)
        return time.perf_counter() - begun


async def copied(snapshot: Snapshot, name: str = "bench-copy") -> tuple[float, float, float]:
    """Return the seconds until a copy runs, and until a command in it has ended, and its proportional memory in MB."""
    begun = time.perf_counter()
    async with snapshot.fork(name) as copy:
        runs = time.perf_counter() - begun
        await copy.run("true", check=True)
        return runs, time.perf_counter() - begun, proportional(copy.pid)


def proportional(pid: int) -> float:
    """Return the memory of a process in MB, in which each process has its share of shared pages."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("no Pss")


def bare() -> float:
    """Return the seconds that a bare QEMU needs to start, answer and exit."""
    begun = time.perf_counter()
    command = [QEMU, "-nodefaults", "-display", "none", "-S", "-machine", "q35", "-m", "256", "-qmp", "stdio"]
    subprocess.run(
        command, input=b'{"execute":"qmp_capabilities"}{"execute":"quit"}', stdout=subprocess.DEVNULL, check=True
    )
    return time.perf_counter() - begun


def state_copied(snapshot: Snapshot, folder: Path) -> float:
    """Return the seconds of cp(1) of the saved state."""
    begun = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", str(folder / snapshot.name / "state"), str(folder / "copy")], check=True)
    return time.perf_counter() - begun


async def measure(folder: Path) -> None:
    """Measure all figures, and print medians and ratios."""
    boots, pauses, copying, starts, runs, answers = ([] for _ in range(6))
    async with Machine(guest="builtin", qemu=QEMU, name="bench-source", console="headless") as source:
        await source.run("true", check=True)
        for _ in range(ROUNDS):
            snapshot = await source.snapshot()
            pauses.append(snapshot.pause)
            copying.append(await asyncio.to_thread(state_copied, snapshot, folder))
            starts.append(await asyncio.to_thread(bare))
            running, answered, _ = await copied(snapshot)
            runs.append(running)
            answers.append(answered)
            boots.append(await booted())
        begun = time.perf_counter()
        found = await asyncio.gather(*(copied(snapshot, f"bench-{number}") for number in range(COPIES)))
        together = time.perf_counter() - begun
    middle = statistics.median
    show("boot until a command has answered", middle(boots))
    show("copy until a command has answered", middle(answers), middle(boots))
    show("bare QEMU, start to end", middle(starts))
    show("copy until it runs", middle(runs), middle(starts))
    show("cp of the state", middle(copying))
    show("pause of the source", middle(pauses), middle(copying))
    show(f"{COPIES} copies at once, until all have answered", together)
    print(f"proportional memory of each: {middle(memory for _, _, memory in found):.0f} MB")


def show(what: str, seconds: float, beside: float | None = None) -> None:
    """Print a figure, and its ratio to the figure `beside`."""
    print(f"{what:45} {seconds:6.2f} s", "" if beside is None else f"{seconds / beside:6.3f} of it")


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="vmspawn-bench-"))
    os.environ["VMSPAWN_RUNTIME_DIR"] = str(folder / "run")
    os.environ["VMSPAWN_SNAPSHOT_DIR"] = str(folder / "snapshots")
    try:
        (folder / "run").mkdir(mode=0o700)
        (folder / "snapshots").mkdir(mode=0o700)
        asyncio.run(measure(folder / "snapshots"))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

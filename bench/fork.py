# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measures the time to start a copy of a running machine, beside a boot of the same machine.

All figures are taken in turn in one run, with the built-in guest:

1. A boot and a copy, each until a command in the guest has ended.
2. A copy until its QEMU reports that the processors run. One copy loads its memory, and another maps its memory
   (`--ram-backing=file`). For comparison: a bare QEMU, and a QEMU that boots with the copy's arguments, each until it
   reports the same. No copy can be faster than the QEMU that boots.
3. The pause of a save, beside cp(1) of its state.
4. Twenty copies at once: the time of each until its first command has ended, and the memory of each.

The runtime directory is in memory, as /run is, because vmspawn calls fsync(2) on files there.
"""

import asyncio
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from vmspawn import Machine, MachineConfig, Snapshot
from vmspawn.api.launching import start_copy
from vmspawn.boot import incoming
from vmspawn.snapshots.directory import OpenSnapshot
from vmspawn.snapshots.fork import port_arguments

ROUNDS = 5
COPIES = 20
QEMU = os.environ.get("QEMU", "qemu-system-x86_64")
RAM = 256


async def booted() -> float:
    """Return the seconds from the start until a command in the guest has ended."""
    begun = time.perf_counter()
    async with Machine(guest="builtin", qemu=QEMU, name="bench-boot", console="headless") as machine:
        await machine.run("true", check=True)
        return time.perf_counter() - begun


async def copied(snapshot: Snapshot, name: str = "bench-copy") -> tuple[float, float]:
    """Return the seconds until a command in a copy has ended, and the copy's proportional memory in MB."""
    begun = time.perf_counter()
    async with snapshot.fork(name) as copy:
        await copy.run("true", check=True)
        return time.perf_counter() - begun, proportional(copy.pid)


async def copied_together(snapshot: Snapshot) -> tuple[list[float], list[float]]:
    """Start copies at once. Returns the seconds until a command has ended in each, and the memory of each in MB."""
    all_have_answered = asyncio.Barrier(COPIES)

    async def one(number: int) -> tuple[float, float]:
        begun = time.perf_counter()
        async with snapshot.fork(f"bench-{number}") as copy:
            await copy.run("true", check=True)
            answered = time.perf_counter() - begun
            # Copies share pages only while they run.
            await all_have_answered.wait()
            memory = proportional(copy.pid)
            await all_have_answered.wait()
            return answered, memory

    found = await asyncio.gather(*map(one, range(COPIES)))
    return [seconds for seconds, _ in found], [memory for _, memory in found]


def proportional(pid: int) -> float:
    """Return the memory of a process in MB, in which each process has its share of shared pages."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("no Pss")


async def copy_runs(snapshot: Snapshot) -> float:
    """Return the seconds until a copy's QEMU reports that its processors run."""
    begun = time.perf_counter()
    config = MachineConfig(name="bench-runs", console="headless")
    running = await start_copy(config, snapshot.name, keep_disks=False, new_identity=False)
    try:
        status = await running.monitor.execute("query-status")
        seconds = time.perf_counter() - begun
        assert status["running"], status
    finally:
        await running.end()
    return seconds


def qemu_runs(arguments: Sequence[str]) -> float:
    """Return the seconds until a QEMU with these arguments reports that its processors run."""
    begun = time.perf_counter()
    with subprocess.Popen([QEMU, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b'{"execute":"qmp_capabilities"}{"execute":"query-status"}')
        process.stdin.flush()
        while not json.loads(process.stdout.readline()).get("return", {}).get("running"):
            pass
        seconds = time.perf_counter() - begun
        process.stdin.write(b'{"execute":"quit"}')
    return seconds


BARE = ("-nodefaults", "-display", "none", "-machine", "q35", "-m", str(RAM), "-qmp", "stdio")


def arguments_of(snapshot: Snapshot) -> list[str]:
    """Return the arguments of a copy, without its disks, for a QEMU that boots with its monitor on standard input."""
    with contextlib.closing(OpenSnapshot(snapshot.name)) as opened:
        manifest, folder = opened.manifest, opened.path
    places = {
        incoming.MONITORS: ("-qmp", "stdio"),
        incoming.CONSOLE: ("-chardev", "null,id=console"),
        incoming.SIZE: ("-chardev", "null,id=size"),
        incoming.AGENT: ("-chardev", "null,id=agent"),
        incoming.DISKS: port_arguments(manifest),
    }
    options = [
        each._replace(value=os.path.join(folder, each.value or "")) if each.name in incoming.BOOT_FILES else each
        for each in manifest.options
    ]
    return incoming.rebuild(options, places, descriptors={})


def state_copied(snapshot: Snapshot, folder: Path) -> float:
    """Return the seconds of cp(1) of the saved state, which is the memory in use."""
    begun = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", str(folder / snapshot.name / "state"), str(folder / "copy")], check=True)
    return time.perf_counter() - begun


async def measure(folder: Path) -> None:
    """Measure all figures, and print medians and ratios."""
    boots, pauses, copying, starts, same, runs, mapped, answers = ([] for _ in range(8))
    async with (
        Machine(guest="builtin", qemu=QEMU, name="bench-source", console="headless") as source,
        Machine(guest="builtin", qemu=QEMU, name="bench-file", console="headless", ram_backing="file") as file_source,
    ):
        await source.run("true", check=True)
        await file_source.run("true", check=True)
        for _ in range(ROUNDS):
            snapshot = await source.snapshot()
            pauses.append(snapshot.pause)
            copying.append(await asyncio.to_thread(state_copied, snapshot, folder))
            starts.append(await asyncio.to_thread(qemu_runs, BARE))
            same.append(await asyncio.to_thread(qemu_runs, arguments_of(snapshot)))
            runs.append(await copy_runs(snapshot))
            mapped.append(await copy_runs(await file_source.snapshot()))
            answers.append((await copied(snapshot))[0])
            boots.append(await booted())
        begun = time.perf_counter()
        each, memory = await copied_together(snapshot)
        together = time.perf_counter() - begun
    middle = statistics.median
    show("boot until a command has answered", middle(boots))
    show("copy until a command has answered", middle(answers), middle(boots))
    show("bare QEMU until it runs", middle(starts))
    show("QEMU with the copy's devices until it runs", middle(same), middle(starts))
    show("copy until it runs", middle(runs), middle(starts), middle(same))
    show("copy that maps its memory, until it runs", middle(mapped), middle(starts), middle(same))
    show("cp of the state", middle(copying))
    show("pause of the source", middle(pauses), middle(copying))
    show(f"{COPIES} copies at once, until all have answered", together, middle(boots))
    show("each of them, until it has answered", middle(each), middle(boots))
    print(f"memory of each, shared pages divided among all: {middle(memory):.0f} MB")


def show(what: str, seconds: float, *beside: float) -> None:
    """Print a figure, and its ratios to the figures `beside`."""
    print(f"{what:48} {seconds:6.3f} s", ", ".join(f"{seconds / each:6.3f} of it" for each in beside))


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="vmspawn-bench-"))
    run = Path(tempfile.mkdtemp(prefix="vmspawn-bench-", dir="/dev/shm"))
    os.environ["VMSPAWN_RUNTIME_DIR"] = str(run)
    os.environ["VMSPAWN_SNAPSHOT_DIR"] = str(folder / "snapshots")
    try:
        (folder / "snapshots").mkdir(mode=0o700)
        asyncio.run(measure(folder / "snapshots"))
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(run)


if __name__ == "__main__":
    main()

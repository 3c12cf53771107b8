# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measures snapshots and copies of machines with much memory, in both forms of `ram_backing`.

The guest fills half of its memory with the content of a disk. The figures are the pause of the save, the time to start
a copy until its processors run, the time until a command in it has ended, the same for twenty copies at once, and the
memory of each.
"""

import asyncio
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from bench.fork import BARE, QEMU, copied, copied_together, copy_runs, qemu_runs
from vmspawn import Disk, Machine, MachineConfig, Snapshot

#: Sizes of memory in MB.
SIZES = tuple(map(int, sys.argv[1:])) or (256, 1024, 4096)

#: The most memory in MB that twenty copies may take.
_MOST = 14000

_HEAD = ("memory", "backing", "pause", "copy runs", "copy answered", "20: all answered", "20: each", "MB each")


async def measure(folder: Path) -> None:
    """Measure all sizes, and print a table of seconds."""
    print(f"a bare QEMU runs after {await asyncio.to_thread(qemu_runs, BARE):.2f} s")
    print(*(f"{each:>16}" for each in _HEAD))
    for size in SIZES:
        image = make_content(folder / "content", size // 2)
        for backing in ("anonymous", "file"):
            figures = await one(size, backing, image)
            print(f"{size:>13} MB", f"{backing:>16}", *(f"{each:>16.2f}" for each in figures), flush=True)


def make_content(path: Path, size: int) -> Path:
    """Make a file of `size` MB that cannot be compressed."""
    with open(path, "wb") as file:
        for _ in range(size):
            file.write(os.urandom(1 << 20))
    return path


async def one(size: int, backing: str, image: Path) -> list[float]:
    """Measure one machine."""
    config = MachineConfig(
        name="bench-memory",
        guest="builtin",
        qemu=QEMU,
        console="headless",
        ram=size << 20,
        ram_backing=backing,
        extra_disks=(Disk(str(image), "content", read_only=True),),
    )
    async with Machine(config) as machine:
        # The content stays in the guest's page cache, as long as the disk is attached.
        disk = "/dev/disk/by-id/virtio-content"
        await machine.run(f"until [ -e {disk} ]; do usleep 10000; done; cat {disk} >/dev/null", check=True)
        snapshot = await machine.snapshot()
        figures = [snapshot.pause, await copy_runs(snapshot), (await copied(snapshot))[0]]
        if backing == "anonymous" and 20 * snapshot.size >> 20 > _MOST:
            return figures
        return [*figures, *await twenty(snapshot)]


async def twenty(snapshot: Snapshot) -> tuple[float, float, float]:
    """Return the seconds until all of twenty copies have answered, and one copy's mean seconds and memory in MB."""
    begun = time.perf_counter()
    each, memory = await copied_together(snapshot)
    return time.perf_counter() - begun, sum(each) / len(each), sum(memory) / len(memory)


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="vmspawn-bench-"))
    os.environ["VMSPAWN_RUNTIME_DIR"] = str(folder / "run")
    os.environ["VMSPAWN_SNAPSHOT_DIR"] = str(folder / "snapshots")
    try:
        for name in ("run", "snapshots"):
            (folder / name).mkdir(mode=0o700)
        asyncio.run(measure(folder))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

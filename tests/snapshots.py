# SPDX-License-Identifier: LGPL-2.1-or-later
"""Takes, checks and removes snapshots of machines, and writes to the machines' disks."""

import contextlib
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from tests.copies import inner, snapshot_paths
from tests.machines import Machine
from vmspawn import Snapshot
from vmspawn.api import machine as api
from vmspawn.errors import SnapshotInUse
from vmspawn.images import snapshot_files
from vmspawn.snapshots import directory

#: More steps than a save has.
STEPS_MAX = 60


@contextlib.asynccontextmanager
async def saved(machine: api.Machine) -> AsyncIterator[Snapshot]:
    """Take a snapshot; at the end, remove the machine's snapshots, except those that others depend on."""
    try:
        yield await machine.snapshot()
    finally:
        for name in names_of(machine.name):
            with contextlib.suppress(SnapshotInUse):
                directory.remove(name)


def names_of(machine: str) -> list[str]:
    """Return the names of a machine's snapshots. MACHINE@current, on which the others depend, comes last."""
    found = [each for each in snapshot_files.names() if each.startswith(f"{machine}@")]
    return sorted(found, key=lambda each: each.endswith(f"@{directory.CURRENT}"))


def clean_up(machine: str) -> None:
    """Remove a machine's snapshots."""
    for name in names_of(machine):
        directory.remove(name)


def is_whole(snapshot: str) -> bool:
    """Return whether all files of a snapshot exist."""
    opened = directory.OpenSnapshot(snapshot)
    opened.close()
    return all(os.path.exists(os.path.join(opened.path, each.path)) for each in opened.manifest.files)


async def check_writable(machine: Machine) -> None:
    """Check that QEMU can write to the disk's only image. If the image is an overlay, MACHINE@current lists it."""
    (image,) = next(each.images for each in machine.storage if not each.is_boot)
    nodes = await machine.monitor.execute("query-named-block-nodes", {"flat": True})
    assert image.top_node in {each["node-name"] for each in nodes if not each["ro"]}
    assert {each["node-name"] for each in nodes if each["node-name"].startswith("image")} == {
        name for disk in machine.storage for each in disk.images[0].chain for name in (each.file_node, each.top_node)
    }
    if image.base is not None:
        opened = directory.OpenSnapshot(f"{machine.name}@{directory.CURRENT}")
        opened.close()
        assert image.path in opened.manifest.images.values()
        assert image.path.removeprefix(f"{snapshot_files.root()}/") in snapshot_paths()


def count_commands(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, act: Callable[[], None], step: int
) -> list[object]:
    """Call `act` after QEMU has answered `step` batches of commands. Returns a list with an item for each batch."""
    execute_all = machine.monitor.execute_all
    steps: list[object] = []

    async def counted(*arguments: Any, **options: Any) -> list[Any]:
        replies = await execute_all(*arguments, **options)
        steps.append(arguments)
        if len(steps) == step:
            act()
        return replies

    monkeypatch.setattr(machine.monitor, "execute_all", counted)
    return steps


async def write(machine: api.Machine, device: str, number: int) -> None:
    """Write a block of a disk, as a guest would."""
    command = f'qemu-io -d {device} "write -P {number + 1} {number << 16} 4k"'
    said = await inner(machine).monitor.execute("human-monitor-command", {"command-line": command})
    assert not said.strip(), said

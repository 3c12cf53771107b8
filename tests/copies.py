# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starts copies of machines for tests, and inspects the directory of snapshots."""

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

from tests.shell import Shell
from vmspawn import Snapshot
from vmspawn.api import machine as api
from vmspawn.host.runtime import CONSOLE
from vmspawn.images import snapshot_files
from vmspawn.machine.running import Running


def inner(machine: api.Machine) -> Running:
    """Return the internal `Running` of a `vmspawn.Machine`."""
    return machine._running


@contextlib.asynccontextmanager
async def forked(
    snapshot: Snapshot, name: str | None = None, *, keep_disks: bool = False
) -> AsyncIterator[tuple[api.Machine, Shell]]:
    """Start a copy of a machine whose shell was at its prompt. Yields the copy and its console."""
    async with snapshot.fork(name, keep_disks=keep_disks) as copy:
        path = inner(copy).directory.file(CONSOLE)
        import asyncio

        reader, writer = await asyncio.open_unix_connection(path)
        shell = Shell(reader, writer)
        try:
            yield copy, shell
        finally:
            shell.close()


def everything_below(folder: str) -> set[str]:
    """Return the paths of all files of a directory, including hidden ones."""
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*")}


def snapshot_paths() -> set[str]:
    """Return the paths of all entries of the directory of snapshots, relative to it."""
    return everything_below(snapshot_files.root())


def is_part_of_snapshot(path: Path) -> bool:
    """Return whether a file is part of a snapshot, so that no vmspawn command opens it for writing."""
    found = os.stat(path)
    return bool(snapshot_files.owner_of(found.st_dev, found.st_ino))

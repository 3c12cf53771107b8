# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes the directory of a machine that starts, and starts the process that removes it if this program dies."""

from __future__ import annotations

import os
from contextlib import ExitStack

from ..host import runtime, watcher
from ..host.runtime import MachineDirectory
from ..host.spawn import kill_child, spawn
from .config import MachineConfig


def make_directory(config: MachineConfig, undo: ExitStack, parent: int = 0) -> tuple[MachineDirectory, int]:
    """Make and lock the machine's directory and its control socket, and start its watcher if one is needed.

    The watcher ends the machine if this program or its parent dies. `parent` is the process that the machine must not
    outlive, if that is not this program's parent. Returns the directory, and the watcher's process id or 0. `undo`
    removes both. Raises the errors of `MachineDirectory.create`, and OSError.
    """
    parent = parent or (os.getppid() if config.die_with_parent else 0)
    if not (config.die_with_program or parent):
        return _make(config, undo), 0
    processes = (os.getpid(), parent) if parent else (os.getpid(),)
    told, tell = os.pipe()
    try:
        # The watcher is started first: if this program is killed after it has made the directory, nothing is left.
        pid = _start_watcher(config, processes, told)
        undo.callback(kill_child, pid)
        directory = _make(config, undo)
        os.write(tell, b"%d" % directory.inode)
    finally:
        os.close(told)
        os.close(tell)
    return directory, pid


def _make(config: MachineConfig, undo: ExitStack) -> MachineDirectory:
    directory = MachineDirectory.create(config.name or "")
    undo.callback(directory.remove)
    directory.listen()
    return directory


def _start_watcher(config: MachineConfig, processes: tuple[int, ...], told: int) -> int:
    """Start the watcher, which reads the directory's inode from the pipe `told`. Returns its process id."""
    path = os.path.join(runtime.runtime_root(), runtime.check_name(config.name or ""))
    command = watcher.command(path, runtime.FILES, processes)
    with open(os.devnull, "wb") as nowhere:
        return spawn(command, keep=[], log=nowhere.fileno(), streams=(told, nowhere.fileno()))

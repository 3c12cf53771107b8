# SPDX-License-Identifier: LGPL-2.1-or-later
"""Boots the built-in guest and saves it, for `warm.py`: `python -m vmspawn.snapshots.warm_maker PATH`.

The maker is a separate process, because the process that needs the snapshot may run an event loop already.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec

from ..aio import programs
from ..boot.config import MachineConfig
from ..boot.launch import launch
from ..console.hub import Console
from ..errors import NotConnected, NotSupported, StartError, Timeout, VmspawnError
from ..inside.inside import Inside
from ..machine.running import Running, run
from .background import failure
from .directory import CONSOLE
from .save import save

#: Seconds that the guest may take to boot on a busy host, and that its agent may then take to answer.
_BOOT_TIMEOUT = 120.0
_AGENT_TIMEOUT = 5.0

#: Seconds that the maker may take in all.
_TIMEOUT = 180.0

#: The last message of the guest's boot, and the prompt of its shell. The shell may then ask for the cursor's position.
_BOOTED = re.compile(rb"vmspawn-guest: ready.*# (\x1b\[6n)?\Z", re.DOTALL)


def run_maker(path: str, config: MachineConfig, lock: int) -> None:
    """Make a warm snapshot at a path, in a separate process. Raises StartError.

    The process inherits the descriptor `lock`, so the path stays locked if this process is killed meanwhile.
    """
    command = [sys.executable, "-m", "vmspawn.snapshots.warm_maker", path]
    try:
        done = programs.run(command, timeout=_TIMEOUT, feed=msgspec.json.encode(config), inherited=(lock,))
    except subprocess.TimeoutExpired:
        raise StartError(f"the guest has not booted within {_TIMEOUT:g} s", hint="start it without warm") from None
    if done.returncode:
        raise failure(done.stderr.decode(errors="replace"))


async def make(path: str, config: MachineConfig) -> None:
    """Boot the guest, and save it at a path. Raises VmspawnError, OSError; nothing is left behind then."""
    with tempfile.TemporaryDirectory(prefix=scratch_prefix(path), dir=os.path.dirname(path)) as folder:
        machine = await run(launch(config))
        try:
            shown = await _until_booted(machine.console)
            await _prepare_commands(machine)
            saved = await save(machine, "warm", parent=folder)
        finally:
            await machine.end()
        _publish(os.path.join(folder, saved.manifest.full_name), path, shown)


def scratch_prefix(path: str) -> str:
    """Return the prefix of the temporary directories in which the snapshot for a path is made."""
    return f".{os.path.basename(path)}-"


async def _prepare_commands(machine: Running) -> None:
    """Wait for the agent, and plug in the ports for one command. A guest built without a compiler has no agent."""
    inside = Inside(machine)
    try:
        with contextlib.suppress(TimeoutError, Timeout, NotSupported):
            async with asyncio.timeout(_AGENT_TIMEOUT):
                await inside.commands.plug_ahead()
    finally:
        inside.close()


def _publish(made: str, path: str, shown: bytes) -> None:
    Path(made, CONSOLE).write_bytes(shown)
    os.rename(made, path)


async def _until_booted(console: Console) -> bytes:
    """Wait for the shell's prompt; returns all that was shown. Raises StartError."""
    viewer = _Collector()
    console.attach(viewer)
    try:
        async with asyncio.timeout(_BOOT_TIMEOUT):
            await viewer.booted.wait()
    except TimeoutError:
        raise StartError(f"the built-in guest has not booted within {_BOOT_TIMEOUT:g} s") from None
    finally:
        console.detach(viewer)
    if not viewer.is_booted:
        raise NotConnected("the built-in guest ended before it had booted")
    return bytes(viewer.shown)


class _Collector:
    """A viewer of the console that waits for the shell's prompt."""

    is_full = False

    def __init__(self) -> None:
        self.shown = bytearray()
        self.booted = asyncio.Event()

    @property
    def is_booted(self) -> bool:
        """True if the output ends with the prompt."""
        return _BOOTED.search(self.shown) is not None

    def show(self, data: bytes) -> None:
        """Take output."""
        self.shown += data
        if self.is_booted:
            self.booted.set()

    def finish(self) -> bool:
        """Stop waiting. Returns True."""
        self.booted.set()
        return True


def main() -> None:
    """Make the snapshot that the argument and standard input describe."""
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=MachineConfig)
    # The machine ends if this process is killed.
    own = config._replace(name=f"warm-{os.getpid()}", console="headless", die_with_program=True)
    try:
        asyncio.run(make(sys.argv[1], own))
    except (VmspawnError, OSError) as error:
        print(f"vmspawn: {error}", *filter(None, [getattr(error, "hint", "")]), sep="\n", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Boot the built-in guest and save it, for `warm.py`: `python -m vmspawn.snapshots.warm_maker PATH`.

It is a process of its own: the one that needs the copy may be about to start, or may run an event loop already.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec

from ..aio import programs
from ..boot.config import MachineConfig
from ..boot.launch import launch
from ..console.hub import Console
from ..errors import NotConnected, StartError, VmspawnError
from ..inside.inside import Inside
from ..machine.running import run
from .background import failure
from .directory import CONSOLE
from .save import save

#: Seconds that the guest may take to boot on a busy host, and its agent to answer once it has.
_BOOT_TIMEOUT = 120.0
_AGENT_TIMEOUT = 5.0

#: Seconds for all of it.
_TIMEOUT = 180.0

#: What the guest prints once it has booted: of itself, and its shell's prompt.
_READY = b"vmspawn-guest: ready"
_PROMPT = b"# "

#: What the shell's line editor asks the terminal after the prompt: the position of the cursor.
_CURSOR_QUERY = b"\x1b[6n"


def run_maker(path: str, config: MachineConfig) -> None:
    """Make a warm copy at a path, in a process of its own. Raises StartError."""
    command = [sys.executable, "-m", "vmspawn.snapshots.warm_maker", path]
    try:
        done = programs.run(command, timeout=_TIMEOUT, feed=msgspec.json.encode(config))
    except subprocess.TimeoutExpired:
        raise StartError(f"the guest has not booted within {_TIMEOUT:g} s", hint="start it without warm") from None
    if done.returncode:
        raise failure(done.stderr.decode(errors="replace"))


async def make(path: str, config: MachineConfig) -> None:
    """Boot the guest, and save it at a path. Raises VmspawnError, OSError; nothing is left behind then."""
    machine = await run(launch(config))
    folder = tempfile.mkdtemp(prefix=f".{os.path.basename(path)}-", dir=os.path.dirname(path))
    try:
        shown = await _until_booted(machine.console)
        inside = Inside(machine)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_AGENT_TIMEOUT):
                await inside.commands.agent.ready()
        inside.close()
        saved = await save(machine, "warm", parent=folder)
        made = os.path.join(folder, saved.manifest.full_name)
        await asyncio.to_thread(Path(made, CONSOLE).write_bytes, shown)
        os.rename(made, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        await machine.end()


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
        """Whether the prompt is the last that was shown."""
        return _READY in self.shown and self.shown.removesuffix(_CURSOR_QUERY).endswith(_PROMPT)

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
    """Make what the arguments and standard input describe."""
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=MachineConfig)
    # It ends with the one that waits for it.
    own = config._replace(name=f"warm-{os.getpid()}", console="headless", die_with_program=True)
    try:
        asyncio.run(make(sys.argv[1], own))
    except (VmspawnError, OSError) as error:
        print(f"vmspawn: {error}", *filter(None, [getattr(error, "hint", "")]), sep="\n", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()

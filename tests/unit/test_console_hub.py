# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that the console ends with QEMU, for every kind of viewer."""

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from vmspawn.api import console as api_console
from vmspawn.console.hub import Console, Viewer
from vmspawn.console.panic import OutputWatch
from vmspawn.console.viewers import OutputViewer, Transcript
from vmspawn.manager.job import Tail

DEADLINE = 10


def failed(error: OSError) -> None:
    raise error


def output_viewer(hub: Console, folder: Path) -> Viewer:
    fd = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
    return OutputViewer(hub, fd, on_failed=failed)


def transcript(hub: Console, folder: Path) -> Viewer:
    return Transcript(hub, os.open(folder / "log", os.O_WRONLY | os.O_CREAT), failed)


VIEWERS: dict[str, Callable[[Console, Path], Viewer]] = {
    "watch": lambda hub, folder: OutputWatch(lambda message: None),
    "tail": lambda hub, folder: Tail(),
    "library": lambda hub, folder: api_console.Console("demo", hub.type),
    "output": output_viewer,
    "transcript": transcript,
}


@pytest.mark.parametrize("kind", VIEWERS)
async def test_the_console_ends_with_qemu_while_a_viewer_is_attached(kind: str, tmp_path: Path) -> None:
    source, qemu_output = os.pipe()
    qemu_input, typed = os.pipe()
    for fd in (source, typed):
        os.set_blocking(fd, False)
    hub = Console(typed, source, socket.create_server(str(tmp_path / "console"), family=socket.AF_UNIX))
    hub.attach(VIEWERS[kind](hub, tmp_path))
    os.write(qemu_output, b"the last line\n")
    os.close(qemu_output)
    os.close(qemu_input)
    async with asyncio.timeout(DEADLINE):
        await hub.ended.wait()
    hub.close()

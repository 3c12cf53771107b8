# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests copying files from and to a guest: invalid archives, and invalid paths. Commands run on this host."""

import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from vmspawn.errors import CopyFailed, UsageError
from vmspawn.inside.copying import Copying, Ended, hang_up


class Process:
    """A process with sockets for its streams, as a command in a guest has them."""

    stdin = None

    def __init__(self, script: str, folder: Path) -> None:
        self.stdout, stdout = socket.socketpair()
        self.stderr, stderr = socket.socketpair()
        with stdout, stderr:
            command, output, errors = ["sh", "-c", script], stdout.fileno(), stderr.fileno()
            self._process = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=errors
            )

    def wait(self) -> Ended:
        return Ended(self._process.wait(), 0, 0)

    def close(self) -> None:
        hang_up(self)
        self._process.kill()
        self._process.wait()
        self.stdout.close()
        self.stderr.close()


def test_an_archive_without_an_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "top").mkdir()
    (tmp_path / "target").mkdir()

    def start(arguments: Sequence[bytes], has_input: bool) -> Process:
        return Process("echo 0; tar -c --format=gnu -f - ./top; exec cat /dev/zero", tmp_path)

    with pytest.raises(CopyFailed, match="after the end of the archive"):
        Copying(start).from_guest(["/top"], str(tmp_path / "target"))
    assert os.listdir(tmp_path / "target") == []


@pytest.mark.parametrize(("source", "target"), [("/a\0b", "/x"), ("/a", "/x\0y")])
def test_paths_with_nul_are_refused(source: str, target: str) -> None:
    def start(arguments: Sequence[bytes], has_input: bool) -> Process:
        raise AssertionError("a command was started")

    with pytest.raises(UsageError, match="contains a NUL character"):
        Copying(start).from_guest([source], target)
    with pytest.raises(UsageError, match="contains a NUL character"):
        Copying(start).to_guest(["/a\0b"], "/x")

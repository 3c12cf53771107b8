# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes loop devices, which are block devices without hardware. They need root and the kernel's loop driver."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import make_raw


class Loop:
    """A loop device that can be resized while it is in use."""

    def __init__(self, file: Path, size: int, *options: str) -> None:
        """`options` are options of losetup. Skips the test if no loop device can be made."""
        self._file = make_raw(file, size)
        done = _losetup("--find", "--show", *options, str(file))
        if done.returncode:
            pytest.skip(f"there are no loop devices here: {done.stderr.strip()}")
        self.path = done.stdout.strip()

    def resize(self, size: int) -> None:
        """Resize the device."""
        os.truncate(self._file, size)
        assert _losetup("--set-capacity", self.path).returncode == 0

    def __enter__(self) -> "Loop":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the device."""
        assert _losetup("--detach", self.path).returncode == 0


def _losetup(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("losetup", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if not program:
        pytest.skip("losetup is not installed")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)

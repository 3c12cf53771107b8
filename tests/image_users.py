# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs another program that has locked an image."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def other_user(image: Path) -> Iterator[int]:
    """Run another program that has locked the image; yields its process id."""
    with subprocess.Popen(
        ["qemu-io", "-f", "raw", str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("length\n")
        process.stdin.flush()
        # The program prints a prompt, and answers after it has opened the image.
        while "MiB" not in process.stdout.readline():
            assert process.poll() is None
        yield process.pid
        process.stdin.write("quit\n")
        process.stdin.close()

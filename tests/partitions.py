# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes disk images with partition tables that sfdisk writes."""

import shutil
import subprocess
from pathlib import Path

import pytest

#: The types of partitions in a GPT.
ROOT = "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709"
USR = "8484680C-9521-48C6-9C11-B0720656F69E"
ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"

needs_sfdisk = pytest.mark.skipif(not shutil.which("sfdisk"), reason="sfdisk is not installed")


def partitioned(path: Path, *lines: str, label: str = "gpt") -> Path:
    """Make an image of 32 MiB with partitions of 1 MiB each, from lines of sfdisk's script format."""
    with path.open("wb") as file:
        file.truncate(32 << 20)
    script = "\n".join((f"label: {label}", *(f"size=1MiB, {line}" for line in lines)))
    subprocess.run(["sfdisk", "--quiet", str(path)], input=script, text=True, check=True)
    return path

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes unified kernel images for tests, from systemd's stub with objcopy."""

import shutil
import subprocess
from pathlib import Path

import pytest


def make_uki(path: Path, stub: Path, kernel: Path, initrd: Path, os_release: Path) -> Path:
    """Make a UKI without a command line, so that the kernel's arguments come from outside."""
    for program in ("objcopy", "objdump"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed (Debian: binutils)")
    # Each section follows the previous one, at a multiple of the stub's alignment.
    address = _end(stub)
    options: list[str] = []
    for name, source in ((".osrel", os_release), (".linux", kernel), (".initrd", initrd)):
        options += ["--add-section", f"{name}={source}", "--change-section-vma", f"{name}={address:#x}"]
        options += ["--set-section-flags", f"{name}=data,readonly"]
        address = _align(address + source.stat().st_size)
    subprocess.run(["objcopy", *options, str(stub), str(path)], check=True, timeout=60)
    return path


def _align(address: int) -> int:
    return -(-address // 4096) * 4096


def _end(stub: Path) -> int:
    """Return the address at which the last section of a PE image ends in memory."""
    listed = subprocess.run(["objdump", "-h", str(stub)], capture_output=True, text=True, check=True, timeout=60).stdout
    rows = [line.split() for line in listed.splitlines() if line.split()[:1] and line.split()[0].isdigit()]
    return _align(max(int(row[2], 16) + int(row[3], 16) for row in rows))

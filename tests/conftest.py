# SPDX-License-Identifier: LGPL-2.1-or-later
"""What all tests share: a runtime directory of their own, the QEMUs to test with, and images."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# How long an example takes says nothing on a machine that others use too; pytest's own timeout catches what hangs.
hypothesis.settings.register_profile("vmspawn", deadline=None)
hypothesis.settings.load_profile("vmspawn")

MIB = 1 << 20


def qemu_paths() -> list[str]:
    """The QEMUs that the tests run with: VMSPAWN_TEST_QEMU, separated by colons, else the system's."""
    return [path for path in os.environ.get("VMSPAWN_TEST_QEMU", "qemu-system-x86_64").split(":") if path]


@pytest.fixture(
    scope="session", params=qemu_paths(), ids=lambda path: os.path.basename(os.path.dirname(path)) or "system"
)
def qemu(request: pytest.FixtureRequest) -> str:
    """A QEMU to test with."""
    return str(request.param)


@pytest.fixture(scope="session", autouse=True)
def runtime_directory() -> Iterator[Path]:
    """A runtime directory that belongs to this test run, on a file system in memory as the real one is."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = tempfile.mkdtemp(prefix="vmspawn-test-", dir=base)
    before = os.environ.get("VMSPAWN_RUNTIME_DIR")
    os.environ["VMSPAWN_RUNTIME_DIR"] = folder
    yield Path(folder)
    if before is None:
        del os.environ["VMSPAWN_RUNTIME_DIR"]
    else:
        os.environ["VMSPAWN_RUNTIME_DIR"] = before
    shutil.rmtree(folder)


def make_raw(path: Path, size: int = 64 * MIB) -> Path:
    """Make a sparse raw image."""
    with open(path, "wb") as file:
        file.truncate(size)
    return path


def make_qcow2(path: Path, size: int = 64 * MIB) -> Path:
    """Make an empty qcow2 image."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(size)], check=True)
    return path

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the fixtures of all tests: a private runtime directory, the QEMUs to test with, and images."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests import figures
from vmspawn.boot import firmware

# The time of an example means nothing on a shared machine. pytest's timeout catches tests that hang.
hypothesis.settings.register_profile("vmspawn", deadline=None)
hypothesis.settings.load_profile("vmspawn")

MIB = 1 << 20


def qemu_paths() -> list[str]:
    """Return the QEMUs to test with: those in VMSPAWN_TEST_QEMU, separated by colons, else the system's."""
    return [path for path in os.environ.get("VMSPAWN_TEST_QEMU", "qemu-system-x86_64").split(":") if path]


@pytest.fixture(
    scope="session", params=qemu_paths(), ids=lambda path: os.path.basename(os.path.dirname(path)) or "system"
)
def qemu(request: pytest.FixtureRequest) -> str:
    """Return a QEMU to test with."""
    return str(request.param)


@pytest.fixture(scope="session")
def vm_qemu(qemu: str) -> str:
    """Return the same QEMU for the fixtures of vmspawn's own plugin."""
    return qemu


@pytest.fixture(scope="session", autouse=True)
def runtime_directory() -> Iterator[Path]:
    """Make a runtime directory for this test run, in a memory file system, like the real one."""
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


@pytest.fixture(scope="session", autouse=True)
def snapshot_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make a directory for the snapshots of this test run."""
    folder = tmp_path_factory.mktemp("snapshots")
    folder.chmod(0o700)
    before = os.environ.get("VMSPAWN_SNAPSHOT_DIR")
    os.environ["VMSPAWN_SNAPSHOT_DIR"] = str(folder)
    yield folder
    if before is None:
        del os.environ["VMSPAWN_SNAPSHOT_DIR"]
    else:
        os.environ["VMSPAWN_SNAPSHOT_DIR"] = before


@pytest.fixture(scope="session", autouse=True)
def no_uefi(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hide the host's UEFI firmware with empty descriptors, because UEFI takes long to give up on an empty disk."""
    home = tmp_path_factory.mktemp("config")
    before = os.environ.get("XDG_CONFIG_HOME")
    hidden = home / "qemu" / "firmware"
    hidden.mkdir(parents=True)
    os.environ["XDG_CONFIG_HOME"] = str(home)
    for path in firmware.descriptors():
        (hidden / os.path.basename(path)).touch()
    yield
    if before is None:
        del os.environ["XDG_CONFIG_HOME"]
    else:
        os.environ["XDG_CONFIG_HOME"] = before


def make_raw(path: Path, size: int = 64 * MIB) -> Path:
    """Make a sparse raw image."""
    with open(path, "wb") as file:
        file.truncate(size)
    return path


def make_qcow2(path: Path, size: int = 64 * MIB) -> Path:
    """Make an empty qcow2 image."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(size)], check=True)
    return path


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send the figures of an xdist worker to the main process."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["figures"] = figures.FIGURES


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Receive the figures of an xdist worker that has ended."""
    figures.FIGURES += map(tuple, getattr(node, "workeroutput", {}).get("figures", ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures that the tests measured."""
    if lines := figures.table():
        terminalreporter.section("figures")
        for line in lines:
            terminalreporter.write_line(line)

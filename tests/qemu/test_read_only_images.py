# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests images that cannot be written to although their permissions allow it: the hints of the errors work."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import idle, one_line, spawned, vmctl, vmspawn
from tests.conftest import make_raw
from tests.loop import Loop


@pytest.fixture(params=["read-only device", "read-only file system"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "read-only device":
        with Loop(tmp_path / "file", 1 << 20, "--read-only") as loop:
            yield loop.path
        return
    folder = tmp_path / "mounted"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        file = make_raw(folder / "file", 1 << 20)
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        yield str(file)
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_read_only_image_is_attached_as_the_hint_says(qemu: str, tmp_path: Path, image: str) -> None:
    with idle(qemu, tmp_path) as machine:
        refused = vmctl("attach-disk", machine.name, image, "--name=disk")
        assert refused.returncode == 1
        assert one_line(refused, "vmctl").endswith("Read-only file system")
        assert "attach it read-only, or attach a copy" in refused.stderr
        attached = vmctl("attach-disk", machine.name, image, "--name=disk", "--read-only")
        assert (attached.returncode, attached.stderr) == (0, "")


def test_a_machine_starts_from_a_read_only_image_as_the_hint_says(qemu: str, image: str) -> None:
    options = (f"--qemu={qemu}", f"--image={image}", "--ram=64M", "--console=headless")
    refused = vmspawn(*options)
    assert refused.returncode == 1
    assert one_line(refused, "vmspawn").endswith("Read-only file system")
    assert "use --ephemeral, which does not write to the image, or a copy" in refused.stderr
    with spawned(*options, "--ephemeral") as running:
        running.wait_for("is running")

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that BIOS boots raw and qcow2 images on all bootable buses, and that ephemeral images stay unchanged."""

import signal
import subprocess
from pathlib import Path

import pytest

from tests.commands import spawned
from tests.disks import make_builtin_disk


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_builtin_disk(tmp_path_factory.mktemp("disk") / "disk.raw")


@pytest.mark.parametrize(
    ("image_format", "bus", "machine_type"),
    [("raw", "virtio-blk", "q35"), ("qcow2", "nvme", "q35"), ("raw", "virtio-scsi", "pc")],
)
def test_bios_boots_an_image_and_sigterm_shuts_it_down(
    qemu: str, disk: Path, tmp_path: Path, image_format: str, bus: str, machine_type: str
) -> None:
    image = disk
    if image_format == "qcow2":
        image = tmp_path / "disk.qcow2"
        subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(disk), str(image)], check=True)
    before = image.stat().st_mtime_ns
    options = (f"--image-format={image_format}", f"--image-disk-type={bus}", f"--machine-type={machine_type}")
    with spawned(f"--qemu={qemu}", f"--image={image}", "--ram=512M", "--ephemeral", *options) as machine:
        machine.wait_for("vmspawn-guest: ready", stream="stdout")
        machine.signal(signal.SIGTERM)
        assert machine.wait() == 0
    assert "the guest powered off" in machine.output["stderr"]
    assert image.stat().st_mtime_ns == before

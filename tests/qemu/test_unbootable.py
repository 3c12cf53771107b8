# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the explanation for an image that BIOS cannot boot, whose guest prints nothing."""

from pathlib import Path

from tests.commands import spawned
from tests.unit.test_partitions import ESP, needs_sfdisk, partitioned


@needs_sfdisk
def test_a_disk_for_uefi_under_bios_is_explained(qemu: str, tmp_path: Path) -> None:
    image = partitioned(tmp_path / "disk", f"type={ESP}")
    options = (f"--qemu={qemu}", f"--image={image}", "--ram=64M", "--firmware=bios")
    with spawned(*options) as machine:
        machine.wait_for(f"the machine boots by BIOS, and {image} has a boot loader for UEFI only")
        assert machine.output["stdout"] == ""

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that vmspawn explains why a machine prints nothing if BIOS cannot boot its image."""

from pathlib import Path

from tests.commands import spawned
from tests.partitions import ESP, needs_sfdisk, partitioned


@needs_sfdisk
def test_a_disk_for_uefi_under_bios_is_explained(qemu: str, tmp_path: Path) -> None:
    image = partitioned(tmp_path / "disk", f"type={ESP}")
    options = (f"--qemu={qemu}", f"--image={image}", "--ram=64M", "--firmware=bios")
    with spawned(*options) as machine:
        machine.wait_for(f"the machine boots by BIOS, and {image} has a boot loader for UEFI only")
        assert machine.output["stdout"] == ""

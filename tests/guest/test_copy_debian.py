# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests copies, and the conditions of `wait_for`, with Debian, which has systemd and GNU tar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import debian
from tests.commands import vmctl
from tests.guest.test_exec_debian import BOOT_TIMEOUT, ROOT
from tests.machines import Machine, fresh_name
from tests.unit.test_archive import MIB, look, make_sparse, tree
from vmspawn.errors import Timeout

__all__ = ["tree"]

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]


def boot_options(suite: str, folder: Path) -> dict[str, Any]:
    """Return the options that boot a suite of Debian.

    The older suite's systemd does not take the agent as a credential, so the agent is installed in its image.
    """
    if suite == debian.SUITE:
        return {"image": str(debian.disk())}
    tree = debian.tree(suite)
    assert vmctl("agent", f"--root={tree}").returncode == 0
    linux, initrd = debian.kernel(suite)
    image = debian.root(folder / "root", tree)
    return {"image": str(image), "linux": str(linux), "initrd": str(initrd), "kernel_arguments": ROOT}


@pytest.mark.parametrize("suite", [debian.SUITE, debian.OLDER])
@pytest.mark.asyncio
async def test_a_debian_is_waited_for_and_copied_to_and_from(qemu: str, suite: str, tree: Path, tmp_path: Path) -> None:
    debian.need()
    async with Machine(
        **boot_options(suite, tmp_path),
        image_format="raw",
        ephemeral=True,
        ram=1 << 30,
        qemu=qemu,
        name=fresh_name(),
        console="headless",
    ) as machine:
        await machine.wait_for("booted", timeout=BOOT_TIMEOUT)
        state = (await machine.run("systemctl is-system-running")).stdout.strip()
        assert state in ("running", "degraded")
        with pytest.raises(Timeout, match="port=22"):
            await machine.wait_for("agent", "port=22", timeout=1)
        await machine.copy_to(tree, "/var/tmp/there")
        await machine.copy_from("/var/tmp/there", tmp_path / "back")
        assert look(tmp_path / "back") == look(tree)
        sparse = make_sparse(tmp_path / "sparse")
        await machine.copy_to(sparse, "/var/tmp")
        await machine.copy_from("/var/tmp/sparse", tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == sparse.read_bytes()
        assert int((await machine.run("du -k /var/tmp/sparse")).stdout.split()[0]) < 2048
        assert (tmp_path / "again").stat().st_blocks * 512 < 2 * MIB
        skipped = await machine.copy_from("/etc", tmp_path / "etc", skip_special=True)
        assert (tmp_path / "etc" / "os-release").exists() or any("os-release" in each for each in skipped)
        assert (tmp_path / "etc" / "passwd").read_text().startswith("root:")

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests `vmctl agent`: its output, and the files that it installs in a tree."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.commands import VMCTL, one_line, vmctl
from vmspawn.agent import install
from vmspawn.agent.build import build

UNIT = "usr/lib/systemd/system/vmspawn-agent.service"


def test_the_program_is_printed() -> None:
    done = subprocess.run([*VMCTL, "agent"], capture_output=True, check=True)
    assert done.stdout == Path(build("x86_64")).read_bytes()


def test_the_unit_is_printed() -> None:
    assert vmctl("agent", "--unit").stdout == install.installed_unit().decode()


def test_the_program_and_the_unit_are_installed_in_a_tree(tmp_path: Path) -> None:
    for _ in range(2):
        assert vmctl("agent", f"--root={tmp_path}").returncode == 0
    program = tmp_path / install.INSTALLED_PATH.lstrip("/")
    assert os.access(program, os.X_OK)
    wanted = tmp_path / "usr/lib/systemd/system/sysinit.target.wants/vmspawn-agent.service"
    assert wanted.resolve() == (tmp_path / UNIT).resolve()
    assert wanted.read_bytes() == install.installed_unit()


def test_a_missing_tree_is_refused(tmp_path: Path) -> None:
    done = vmctl("agent", f"--root={tmp_path}/nowhere")
    assert done.returncode == 2
    assert "not a directory" in one_line(done, "vmctl")

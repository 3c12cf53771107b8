# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the unit and the credentials that install the agent, with systemd's own check if systemd is installed."""

from __future__ import annotations

import gzip
import shutil
import subprocess
from pathlib import Path

import pytest

from vmspawn.agent import install

AGENT = b"\x7fELF" + bytes(100)


def test_the_agent_comes_compressed_and_is_the_same_each_time() -> None:
    delivered = install.delivery(AGENT)
    assert gzip.decompress(delivered[install.AGENT_CREDENTIAL]) == AGENT
    assert install.delivery(AGENT) == delivered
    assert delivered[install.WANTED_CREDENTIAL] == b"[Unit]\nWants=vmspawn-agent.service\n"


def test_the_unit_imports_the_delivered_credentials() -> None:
    unit = install.delivery(AGENT)["systemd.extra-unit.vmspawn-agent.service"].decode()
    assert f"ImportCredential={install.AGENT_CREDENTIAL}\n" in unit
    assert "[Install]" not in unit


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd-analyze")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    # The check fails if the agent's path is not executable.
    path = tmp_path / install.UNIT
    path.write_bytes(install.installed_unit("/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, [line for line in done.stderr.splitlines() if install.UNIT in line]) == (0, [])

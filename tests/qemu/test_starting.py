# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests clients that connect while a machine starts: they wait, and they are disconnected if the start fails."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.commands import DEADLINE, make_script, spawned, vmctl
from tests.conftest import make_raw
from tests.machines import fresh_name, is_gone
from vmspawn.control.client import Client
from vmspawn.errors import NotConnected
from vmspawn.host.runtime import MachineDirectory


@pytest.fixture
def options(qemu: str, tmp_path: Path) -> tuple[str, ...]:
    """Return the options of a machine whose QEMU first reads a line from the FIFO `go`, and fails without a line."""
    os.mkfifo(tmp_path / "go")
    # vmspawn first starts QEMU to ask for its features. These starts do not wait.
    wait = f"read -r line <{tmp_path}/go || {{ echo no line >&2; exit 1; }}"
    held = f'case "$*" in --version | *"-qmp stdio"*) ;; *) {wait} ;; esac'
    script = make_script(tmp_path / "qemu", f'{held}\nexec {shutil.which(qemu)} "$@"')
    image = make_raw(tmp_path / "boot", 1 << 20)
    return (f"--qemu={script}", f"--image={image}", "--ram=64M", "--console=headless")


def test_a_call_waits_until_the_machine_is_up(options: tuple[str, ...], tmp_path: Path) -> None:
    with spawned(*options) as running:
        # Opening the FIFO waits for its reader.
        with (tmp_path / "go").open("w") as go:
            client = Client(running.name, timeout=DEADLINE)
            client.begin("io.vmspawn.Machine.Describe")
            assert not client.is_answered(within=0)
            go.write("\n")
        with client:
            assert client.finish("Describe")["status"] == "running"


def test_a_call_ends_with_a_failed_start(options: tuple[str, ...], tmp_path: Path) -> None:
    with spawned(*options) as running:
        with (tmp_path / "go").open("w"):
            client = Client(running.name, timeout=DEADLINE)
            client.begin("io.vmspawn.Machine.Describe")
        with client, pytest.raises(NotConnected, match=running.name):
            client.finish("Describe")
        assert running.wait() == 1
    assert "QEMU could not start: no line" in running.output["stderr"]
    assert is_gone(running.name)


def test_the_list_has_a_machine_that_starts() -> None:
    directory = MachineDirectory.create(fresh_name())
    try:
        directory.listen()
        listed = json.loads(vmctl("list", "--json=short").stdout)
        assert [each["status"] for each in listed if each["name"] == directory.name] == ["starting"]
    finally:
        directory.remove()

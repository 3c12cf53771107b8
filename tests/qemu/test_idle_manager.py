# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that a manager does not load modules that only other programs, or rare options, need."""

import sys
from pathlib import Path

import pytest

from tests.commands import Spawned
from tests.conftest import make_raw
from tests.machines import fresh_name
from vmspawn.agent.build import build
from vmspawn.errors import StartError

#: Modules of Python that load OpenSSL or compression libraries, or more than 100 kB.
LARGE = {
    *("_hashlib", "_ssl", "bz2", "email", "gzip", "hashlib", "http", "importlib.metadata", "ipaddress", "lzma"),
    *("multiprocessing", "pathlib", "pickle", "random", "shutil", "ssl", "tempfile", "urllib", "zipfile"),
}

#: vmspawn, which prints its modules when it ends.
PROGRAM = """
import atexit, sys
atexit.register(lambda: print("LOADED", *sys.modules))
from vmspawn.cli.spawn.main import main
main()
"""


def test_a_manager_loads_nothing_large_that_it_can_do_without(qemu: str, tmp_path: Path) -> None:
    try:
        # A manager that has to compile the agent, as at the first use of a source tree, loads more modules.
        build("x86_64")
    except StartError as error:
        pytest.skip(f"no agent: {error}")
    options = (f"--qemu={qemu}", f"--image={make_raw(tmp_path / 'boot', 1 << 20)}", "--ram=64M", "--console=headless")
    running = Spawned(fresh_name(), options, program=(sys.executable, "-c", PROGRAM))
    try:
        running.wait_for("is running")
        assert running.terminate()
        running.wait()
    finally:
        running.close()
    loaded = set(running.output["stdout"].split())
    assert {"asyncio", "asyncvarlink", "vmspawn.qmp.share.multiplexer", "vmspawn.inside.commands"} <= loaded
    assert LARGE & loaded == set()

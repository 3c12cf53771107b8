# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that SIGINT during the start of a command ends it without a traceback, and leaves nothing behind."""

import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from tests.commands import DEADLINE
from tests.conftest import make_raw
from tests.machines import fresh_name, is_gone
from vmspawn.cli.entrypoint import EXIT_INTERRUPTED

#: The entry points of the commands, as `module:function`.
SCRIPTS = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["scripts"]

#: Runs an entry point as its script does. The process gets SIGINT when the entry point opens its n-th file.
#: tests/unit/test_layers.py checks that the import of the entry point loads nothing else.
PROGRAM = """
import os, signal, sys
from {module} import {function}

left = int(sys.argv.pop(1))

def count(event, arguments):
    global left
    if event == "open":
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGINT)

sys.addaudithook(count)
{function}()
"""

#: The number of files from one moment to the next.
_STEP = 15


def interrupted(command: str, *arguments: str) -> Iterator[subprocess.CompletedProcess[str]]:
    """Run a command many times, each with SIGINT at a later moment, until its exit status is 0.

    The moments are every file of the last step, because the work of a command opens only a few files.
    """
    module, function = SCRIPTS[command].split(":")
    program = [sys.executable, "-c", PROGRAM.format(module=module, function=function)]
    moment, step = 1, _STEP
    while True:
        done = subprocess.run(
            [*program, str(moment), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        yield done
        if done.returncode == 0:
            if step == 1:
                return
            moment, step = moment - step, 1
        moment += step


def test_sigint_during_the_start_of_vmctl_prints_no_traceback() -> None:
    """The signal ends the process while it loads modules, and the command once its work has begun."""
    statuses = set()
    for done in interrupted("vmctl", "list"):
        statuses.add(done.returncode)
        assert not done.stderr
    assert statuses == {-signal.SIGINT, EXIT_INTERRUPTED, 0}


def test_sigint_during_the_start_of_vmspawn_prints_no_traceback(qemu: str, tmp_path: Path) -> None:
    """Once the machine is begun, the signal ends the machine."""
    name = fresh_name()
    image = make_raw(tmp_path / "boot", 1 << 20)
    options = ("-M", name, f"--qemu={qemu}", f"--image={image}", "--ram=64M", "--shutdown-timeout=0")
    statuses = set()
    for done in interrupted("vmspawn", *options):
        statuses.add(done.returncode)
        assert is_gone(name)
        if done.returncode == 0:
            assert done.stderr.splitlines()[-1] == "vmspawn: the machine was terminated"
        else:
            assert not done.stderr
    assert statuses == {-signal.SIGINT, EXIT_INTERRUPTED, 0}

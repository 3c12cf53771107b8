# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs the examples of README.md."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import spawned
from tests.conftest import make_raw

README = (Path(__file__).parents[2] / "README.md").read_text()


def example(name: str) -> str:
    """Return the block that follows the marker `run: name`."""
    match = re.search(rf"<!-- run: {name} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert match
    return match[1]


@pytest.fixture
def commands(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which `vmspawn` and `vmctl` are commands of this checkout."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for command, module in (("vmspawn", "spawn"), ("vmctl", "ctl")):
        path = folder / command
        path.write_text(f'#!/bin/sh\nexec {sys.executable} -m vmspawn.cli.{module} "$@"\n')
        path.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def transcript(text: str) -> list[tuple[str, str]]:
    """Split a session into its commands, each with the output that is shown."""
    commands = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE)
    assert commands
    return commands


def run(command: str, folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Run a command of a session, and return its exit status and output."""
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout


def test_the_session_prints_the_output_in_the_readme(commands: dict[str, str], tmp_path: Path) -> None:
    with spawned("--guest=builtin", name="demo") as machine:
        machine.wait_for("vmspawn-guest: ready", stream="stdout")
        for command, output in transcript(example("session")):
            done = run(command, tmp_path, commands)
            # The guest notices a new size when its driver handles the interrupt, so a reader may come first.
            deadline = time.monotonic() + 30
            while command.startswith("vmctl exec demo cat") and done[1] != output and time.monotonic() < deadline:
                done = run(command, tmp_path, commands)
            assert done == (0, output), command
        assert machine.wait() == 0


def test_the_commands_in_the_guest_print_their_output(commands: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(README)
    with spawned("--guest=builtin", name="demo") as machine:
        machine.wait_for("is running")
        script = "set -e\n" + example("exec")
        done = subprocess.run(
            ["/bin/sh", "-c", script],
            env=commands,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    assert done.stdout == "Linux\nHELLO\nREADME.md\n"


def test_the_commands_for_disks_succeed(commands: dict[str, str], tmp_path: Path) -> None:
    with spawned("--guest=builtin", name="demo") as machine:
        machine.wait_for("vmspawn-guest: ready", stream="stdout")
        script = "set -e\n" + example("commands")
        done = subprocess.run(
            ["sh", "-c", script], cwd=tmp_path, env=commands, capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "Attached data.raw on virtio-blk" in done.stdout
        assert "Detached data.raw" in done.stdout
        assert machine.wait() == 0
    assert "the guest powered off" in machine.output["stderr"]


def test_the_python_example_works(tmp_path: Path) -> None:
    make_raw(tmp_path / "data.raw")
    done = subprocess.run(
        [sys.executable, "-c", example("python")], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "StorageDetached" in done.stdout
    assert done.stdout.endswith("the machine was terminated\n")

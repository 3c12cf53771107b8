# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests completion in the shells themselves, with the names of a running machine and of its disks."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs import completion
from tests.commands import VMCTL, Spawned, idle, make_script, vmctl
from tests.conftest import make_raw

DEADLINE = 60.0

#: Names of disks. A shell must quote the second and the third, and would otherwise run the command in the third.
NAMES = ["data", "a disk", "$(touch harm)"]


@pytest.fixture(scope="module")
def machine(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spawned]:
    folder = tmp_path_factory.mktemp("image")
    with idle(qemu, folder) as running:
        for number, name in enumerate(NAMES):
            image = make_raw(folder / f"image{number}")
            assert vmctl("attach-disk", running.name, str(image), f"--name={name}").returncode == 0
        yield running


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Make an environment that has the command vmctl, and each script beside it."""
    for name, text in completion.scripts().items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "bin").mkdir()
    make_script(tmp_path / "bin/vmctl", f'exec {" ".join(VMCTL)} "$@"')
    return {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path)}


def run(command: list[str], environment: dict[str, str]) -> list[str]:
    """Return the lines that a shell printed."""
    done = subprocess.run(
        command,
        cwd=environment["HOME"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def in_bash(environment: dict[str, str], *words: str) -> set[str]:
    """Return bash's completions of the last word. To bash, the = of an option is a word."""
    script = f"""
        . bash-completion/{words[0]}
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
        _{words[0]} {words[0]} "${{@: -1}}" "${{@: -2:1}}"
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    return {line for line in run(["bash", "-c", script, "bash", *words], environment) if line}


def in_fish(environment: dict[str, str], line: str) -> set[str]:
    """Return fish's completions of a line."""
    script = f"source fish/{line.split()[0]}.fish; complete --do-complete '{line}'"
    return {found.partition("\t")[0] for found in run(["fish", "--no-config", "-c", script], environment)}


def test_bash_completes_machines_and_their_disks(machine: Spawned, environment: dict[str, str]) -> None:
    name = machine.name
    assert name in in_bash(environment, "vmctl", "detach-disk", "")
    quoted = {"boot", "data", r"a\ disk", r"\$\(touch\ harm\)"}
    assert in_bash(environment, "vmctl", "detach-disk", name, "") == quoted
    assert in_bash(environment, "vmctl", "detach-disk", name, "a") == {r"a\ disk"}
    assert in_bash(environment, "vmctl", "--timeout", "=", "9", "detach-disk", "--force", name, "d") == {"data"}
    assert in_bash(environment, "vmctl", "detach-disk", "no-machine", "") == set()
    assert not Path(environment["HOME"], "harm").exists()


def test_bash_completes_verbs_options_and_their_values(environment: dict[str, str]) -> None:
    assert in_bash(environment, "vmctl", "detach") == {"detach-disk"}
    assert in_bash(environment, "vmctl", "attach-disk", "m", "--bu") == {"--bus", "--burst"}
    assert in_bash(environment, "vmctl", "attach-disk", "m", "--bus", "=", "nv") == {"nvme", "nvme-ns"}
    assert in_bash(environment, "vmspawn", "--kvm", "=") == {"yes", "no", "auto"}
    assert in_bash(environment, "vmspawn", "--image", "=", "ba") == {"bash-completion"}


@pytest.mark.skipif(not shutil.which("fish"), reason="fish is not installed")
def test_fish_completes_machines_and_their_disks(machine: Spawned, environment: dict[str, str]) -> None:
    assert machine.name in in_fish(environment, "vmctl detach-disk ")
    assert in_fish(environment, f"vmctl detach-disk {machine.name} ") == {"boot", *NAMES}
    assert in_fish(environment, f"vmctl detach-disk --force {machine.name} d") == {"data"}
    assert in_fish(environment, "vmctl attach-disk m --bus=nv") == {"--bus=nvme", "--bus=nvme-ns"}

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs the examples of docs/api.md, docs/testing.md and docs/qmp.md, and checks that docs/api.md is complete."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import vmspawn
from tests.commands import VMCTL, spawned
from tests.conftest import MIB

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
DEADLINE = 110


def blocks(document: str, mark: str) -> list[tuple[str, str]]:
    """Return the blocks that follow a mark, each with the mark's argument."""
    text = (DOCS / document).read_text()
    found = re.findall(rf"<!-- {mark}:?\s?(\S*) -->\n```\w+\n(.*?)```", text, re.DOTALL)
    assert found
    return found


def run(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_examples_of_the_library_run(tmp_path: Path) -> None:
    output = run([sys.executable, "-c", "\n".join(text for _, text in blocks("api.md", "run"))], tmp_path)
    assert "GenericError" in output
    assert output.endswith("the machine was terminated\n")


@pytest.mark.parametrize("name", sorted(vmspawn.__all__))
def test_every_public_name_is_documented(name: str) -> None:
    assert re.search(rf"\b{name}\b", (DOCS / "api.md").read_text())


def test_every_method_of_a_machine_is_documented() -> None:
    text = (DOCS / "api.md").read_text()
    for name in dir(vmspawn.Machine):
        assert name.startswith("_") or f"`{name}" in text, name


def test_the_tests_of_the_tutorial_pass(tmp_path: Path) -> None:
    files = blocks("testing.md", "file")
    for name, text in files:
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:asyncio", "--vm-console"]
    command += [name for name, _ in files]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE)
    assert "5 passed" in done.stdout, done.stdout + done.stderr
    assert "vmspawn-guest: ready" in done.stderr


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """Return a directory with the socket demo.sock of the machine demo, and an environment with the command vmctl."""
    folder = tmp_path_factory.mktemp("demo")
    script = folder / "vmctl"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m vmspawn.cli.ctl "$@"\n')
    script.chmod(0o755)
    image = folder / "boot.raw"
    image.write_bytes(bytes(range(256)) * (MIB >> 8))
    with spawned(f"--image={image}", "--ram=64M", "--console=headless", name="demo") as machine:
        machine.wait_for("is running")
        environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "GOCACHE": str(folder / "go")}
        with serving("demo", folder / "demo.sock"):
            yield folder, environment


@contextmanager
def serving(machine: str, path: Path) -> Iterator[None]:
    with subprocess.Popen([*VMCTL, "qmp-socket", machine, str(path)], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr
            assert "serving" in process.stderr.readline()
            yield
        finally:
            process.terminate()


def node_modules() -> str:
    """Return the directory with npm's qemu-qmp, which is installed into the cache of this checkout."""
    folder = ROOT / ".cache" / "npm"
    if not (folder / "node_modules" / "qemu-qmp").exists():
        command = ["npm", "install", "--silent", "--prefix", str(folder), "qemu-qmp"]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"npm cannot install qemu-qmp: {error}")
    return str(folder / "node_modules")


PROGRAMS = {"python": ("py", [sys.executable]), "node": ("js", ["node"]), "go": ("go", ["go", "run"])}
PROGRAMS |= {"shell": ("sh", ["sh"]), "backup": ("py", [sys.executable]), "nbd": ("sh", ["sh"])}
OUTPUT = {
    "python": "running\nSTOP\n",
    "node": "running\nSTOP\n",
    "go": "running\nSTOP\n",
    "shell": '"paused"',
    "backup": "copied",
    "nbd": "virtual size: 1 MiB",
}


@pytest.mark.parametrize("language", sorted(OUTPUT))
def test_each_program_that_uses_qmp_prints_its_result(demo: tuple[Path, dict[str, str]], language: str) -> None:
    folder, environment = demo
    suffix, command = PROGRAMS[language]
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not installed")
    if language == "node":
        environment = {**environment, "NODE_PATH": node_modules()}
    text = dict(blocks("qmp.md", "run"))[language]
    (folder / f"{language}.{suffix}").write_text(text)
    assert OUTPUT[language] in run([*command, f"{language}.{suffix}"], folder, environment)
    if language == "backup":
        assert (folder / "copy.raw").read_bytes() == (folder / "boot.raw").read_bytes()

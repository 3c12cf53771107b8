# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the wheel in a user's environment.

The wheel is used by pytest with other plugins, by parallel and by killed test runs, by testinfra, by Ansible, and by
type checkers of a user's program.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.test_docs import blocks
from tests.unit.test_user_types import PROGRAM, expected_errors
from vmspawn.cache import cache_directory

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
PACKAGES = ["pytest", "pytest-xdist", "pytest-asyncio", "anyio", "pytest-testinfra", "ansible-core", "mypy", "pyright"]
DEADLINE = 60.0

#: Seconds for a run of pytest.
RUN_TIMEOUT = 1800.0


class Environment:
    """A virtual environment with the wheel, and a runtime directory in which its machines live."""

    def __init__(self, folder: Path, runtime: Path) -> None:
        self.folder = folder
        self.runtime = runtime
        self.variables = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))},
            "VMSPAWN_RUNTIME_DIR": str(runtime),
            "VMSPAWN_CACHE_DIR": cache_directory(),
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        }

    def command(self, name: str, *arguments: str) -> list[str]:
        return [str(self.folder / "bin" / name), *arguments]

    def pytest(self, project: Path, *arguments: str) -> str:
        """Run pytest, and return its output. Fails if a process or a directory of its machines is left."""
        command = self.command("pytest", "-p", "no:cacheprovider", *arguments)
        done = subprocess.run(
            command, cwd=project, env=self.variables, capture_output=True, text=True, timeout=RUN_TIMEOUT
        )
        assert not self.left()
        assert done.returncode == pytest.ExitCode.OK, done.stdout + done.stderr
        return done.stdout

    def left(self) -> list[str]:
        """Return the directories of machines, and the processes with such a directory on their command lines."""
        found = [str(each) for each in self.runtime.iterdir()]
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                if os.fsencode(self.runtime) + b"/" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(f"process {pid}")
            except OSError:
                continue
        return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, runtime_directory: Path) -> Iterator[Environment]:
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    # The path of a socket has to be short.
    machines = runtime_directory / "w"
    machines.mkdir()
    found = Environment(folder, machines)
    done = subprocess.run(found.command("pip", "install", "-q", str(wheel), *PACKAGES), capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot install the packages: {done.stderr}")
    yield found
    shutil.rmtree(machines)


def test_the_tests_of_the_tutorial_pass(environment: Environment, tmp_path: Path) -> None:
    files = blocks("testing.md", "file")
    for name, text in files:
        (tmp_path / name).write_text(text)
    assert "5 passed" in environment.pytest(tmp_path)
    assert "5 passed" in environment.pytest(tmp_path, "-n", "2")


ASYNCHRONOUS = """
import pytest

async def test_it(async_vm):
    mark = async_vm.events.mark
    await async_vm.pause()
    await async_vm.events.wait("STOP", since=mark)
    await async_vm.resume()
    assert (await async_vm.run("echo hi")).stdout == "hi\\n"
    async with await async_vm.execute(["cat"]) as command:
        command.stdin.write(b"one\\n")
        assert await command.stdout.readline() == b"one\\n"
        assert await command.communicate(b"two") == (b"two", b"")
"""

ANYIO = """
@pytest.fixture
def anyio_backend():
    return "asyncio"

pytestmark = pytest.mark.anyio
"""


@pytest.mark.parametrize(
    ("more", "options"),
    [
        ("pytestmark = pytest.mark.asyncio", ["--asyncio-mode=strict"]),
        ("", ["--asyncio-mode=auto"]),
        (ANYIO, ["--asyncio-mode=strict"]),
        (ANYIO, ["-p", "no:asyncio"]),
    ],
    ids=["strict", "auto", "anyio", "anyio-alone"],
)
def test_an_asynchronous_test_passes_under_pytest_asyncio_and_anyio(
    environment: Environment, tmp_path: Path, more: str, options: list[str]
) -> None:
    (tmp_path / "test_it.py").write_text(ASYNCHRONOUS + more)
    warnings = ["-W", "error", "-o", "asyncio_default_fixture_loop_scope=function"]
    assert "1 passed" in environment.pytest(tmp_path, *options, *(warnings if "no:asyncio" not in options else ()))


def test_testinfra_looks_into_a_machine(environment: Environment, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        """
import testinfra

def test_it(vm):
    host = testinfra.get_host(f"vmspawn://{vm.name}")
    assert host.file("/proc/version").contains("Linux")
    assert host.file("/etc").is_directory
    assert host.check_output("echo %s", "a  b") == "a  b"
    assert (host.run("echo no >&2; exit 3").rc, host.run("echo no >&2").stderr) == (3, "no\\n")
"""
    )
    assert "1 passed" in environment.pytest(tmp_path)


def test_ansible_works_in_a_machine(environment: Environment, tmp_path: Path) -> None:
    (tmp_path / "greet.sh").write_text("#!/bin/sh\necho hello from $(uname -s)\n")
    (tmp_path / "play.yml").write_text(
        json.dumps(
            [
                {
                    "hosts": "all",
                    "gather_facts": False,
                    "connection": "vmspawn",
                    "tasks": [
                        {"raw": "exit 3", "register": "done", "failed_when": "done.rc != 3"},
                        {"script": "greet.sh", "register": "greeting"},
                        {"assert": {"that": "greeting.stdout == 'hello from Linux\\n'"}},
                    ],
                }
            ]
        )
    )
    (tmp_path / "test_it.py").write_text(
        """
import os, subprocess
import vmspawn

PLUGINS = os.path.join(os.path.dirname(vmspawn.__file__), "testing", "ansible")

def test_it(vm):
    command = ["ansible-playbook", "-i", f"{vm.name},", "play.yml"]
    environment = {**os.environ, "ANSIBLE_CONNECTION_PLUGINS": PLUGINS}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    vm.terminate()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert "unreachable=1" in done.stdout
"""
    )
    assert "1 passed" in environment.pytest(tmp_path)


def test_type_checkers_accept_right_uses_and_report_wrong_ones(environment: Environment, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "strict"}))
    for checker in (["mypy", "--strict"], ["pyright", f"--pythonpath={environment.folder}/bin/python"]):
        command = [*environment.command(*checker), "program.py"]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment.variables, capture_output=True, text=True, timeout=300
        )
        found = {int(line) for line in re.findall(r"program\.py:(\d+)(?::\d+)?(?: -|:) error", done.stdout)}
        assert found == set(expected_errors()), done.stdout + done.stderr


def test_the_pytest_of_debian_12_loads_the_plugin(environment: Environment, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    old = Environment(folder, environment.runtime)
    (wheel,) = environment.folder.glob("*.whl")
    subprocess.run(old.command("pip", "install", "-q", str(wheel), "pytest==7.2.1", "pluggy==1.0.0"), check=True)
    (tmp_path / "test_it.py").write_text(MANY.format(count=1))
    assert "1 passed" in old.pytest(tmp_path)


MANY = """
import pytest

@pytest.mark.parametrize("number", range({count}))
def test_it(vm, number):
    assert vm.run(f"echo {{number}}").stdout == f"{{number}}\\n"
"""


def test_two_hundred_tests_pass_on_four_workers(environment: Environment, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(MANY.format(count=200))
    # If a machine ends while vmspawn prepares ports for the next command, vmspawn must close these ports.
    warnings = ["-W", "error::ResourceWarning", "-W", "error::pytest.PytestUnraisableExceptionWarning"]
    assert "200 passed" in environment.pytest(tmp_path, "-n", "4", "-q", *warnings)


def test_nothing_is_left_of_runs_that_are_killed(environment: Environment, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(MANY.format(count=1000))
    moments = random.Random(20)
    for attempt in range(20):
        command = environment.command("pytest", "-p", "no:cacheprovider", "-q", "-n", "2")
        with subprocess.Popen(
            command, cwd=tmp_path, env=environment.variables, stdout=subprocess.DEVNULL, start_new_session=True
        ) as run:
            moment = moments.uniform(0.5, 12)
            time.sleep(moment)
            # Every second run is killed with its workers, which are in its process group. The workers of the other runs
            # notice that pytest is gone.
            os.killpg(run.pid, signal.SIGKILL) if attempt % 2 else run.kill()
        deadline = time.monotonic() + DEADLINE
        while left := environment.left():
            assert time.monotonic() < deadline, f"killed after {moment:.2f} s: {left}"
            time.sleep(0.1)

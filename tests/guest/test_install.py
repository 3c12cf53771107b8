# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that the wheel, built from the source distribution, works in a clean environment and can be removed."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.commands import Spawned
from tests.machines import fresh_name, is_gone
from vmspawn.version import VERSION

PROJECT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet"]

#: vmspawn's run-time dependencies. The clean environment can import no other packages of this environment.
DEPENDENCIES = ("asyncvarlink", "msgspec")

DEADLINE = 120.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("pip"), reason="pip is not installed"),
]


class Installation(NamedTuple):
    """A virtual environment with the wheel, and a home directory for its user."""

    venv: Path
    home: Path

    @classmethod
    def make(cls, folder: Path, wheel: Path) -> "Installation":
        """Install the wheel without downloads: the dependencies are linked to those of this Python."""
        made = cls(folder / "venv", folder / "home")
        made.home.mkdir()
        venv.create(made.venv, with_pip=False)
        dependencies = folder / "dependencies"
        dependencies.mkdir()
        for name in DEPENDENCIES:
            spec = importlib.util.find_spec(name)
            assert spec is not None
            assert spec.origin is not None
            (dependencies / name).symlink_to(Path(spec.origin).parent)
        next(made.venv.glob("lib/python*/site-packages")).joinpath("dependencies.pth").write_text(f"{dependencies}\n")
        made.pip("install", "--no-index", "--no-deps", str(wheel))
        return made

    def pip(self, *arguments: str) -> None:
        """Run this Python's pip on the environment."""
        subprocess.run([*PIP, "--python", str(self.venv / "bin/python"), *arguments], check=True, timeout=DEADLINE)

    def command(self, program: str) -> list[str]:
        """Return the command line that runs an installed program in this user's home directory."""
        cache = os.environ.get("VMSPAWN_CACHE_DIR") or os.path.join(
            os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "vmspawn"
        )
        settings = [f"HOME={self.home}", f"VMSPAWN_CACHE_DIR={cache}", f"PATH={self.venv / 'bin'}:{os.environ['PATH']}"]
        unset = [f"--unset={name}" for name in ("PYTHONPATH", "XDG_DATA_HOME")]
        return ["env", f"--chdir={self.home}", *unset, *settings, program]

    def run(self, program: str, *arguments: str) -> str:
        """Run an installed program, which must succeed, and return its output."""
        done = subprocess.run(
            [*self.command(program), *arguments], capture_output=True, text=True, timeout=DEADLINE, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def run(command: Sequence[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, timeout=DEADLINE, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from the source distribution."""
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(folder)], PROJECT)
    (source,) = folder.glob("*.tar.gz")
    run([*PIP, "wheel", "--no-index", "--no-deps", "--no-build-isolation", str(source)], folder)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    return Installation.make(tmp_path_factory.mktemp("installed"), wheel)


def test_a_machine_runs_outside_the_checkout(installed: Installation) -> None:
    machine = Spawned(fresh_name(), ("--guest=builtin",), program=installed.command("vmspawn"))
    try:
        machine.wait_for("vmspawn-guest: ready", stream="stdout")
        found = json.loads(installed.run("vmctl", "status", machine.name, "--json=short"))
        assert found["status"] == "running"
        installed.run("truncate", "--size=1M", "data")
        assert "Attached data" in installed.run("vmctl", "attach-disk", machine.name, "data")
        assert installed.run("vmctl", "__complete", "disks", machine.name).splitlines() == ["data"]
        assert installed.run("vmctl", "detach-disk", machine.name, "data") == "Detached data\n"
        installed.run("vmctl", "poweroff", machine.name)
        assert machine.wait() == 0
    finally:
        machine.close()
    assert is_gone(machine.name)


def test_the_package_runs_as_a_module(installed: Installation) -> None:
    assert installed.run("python", "-m", "vmspawn", "--version") == f"vmspawn {VERSION}\n"
    found = installed.run("python", "-c", "import vmspawn; print(vmspawn.__file__)")
    assert Path(found).is_relative_to(installed.venv)


def test_extras_are_installed_for_a_user_and_removed(installed: Installation) -> None:
    before = contents(installed.home)
    said = installed.run("vmctl", "install-extras", "--user")
    share = installed.home / ".local/share"
    made = {str(path.relative_to(share)) for path in share.rglob("*") if path.is_file()}
    assert made == {
        "vmspawn/extras.json",
        "systemd/user/vmspawn@.service",
        *(f"man/man1/{name}.1" for name in ("vmspawn", "vmctl")),
        *(f"bash-completion/completions/{name}" for name in ("vmspawn", "vmctl")),
        *(f"zsh/site-functions/_{name}" for name in ("vmspawn", "vmctl")),
        *(f"fish/vendor_completions.d/{name}.fish" for name in ("vmspawn", "vmctl")),
    }
    assert f"fpath=({share}/zsh/site-functions $fpath)" in said
    unit = (share / "systemd/user/vmspawn@.service").read_text()
    assert f"ExecStart={installed.venv}/bin/vmspawn --adopt-or-start " in unit
    if shutil.which("man"):
        assert installed.run("man", f"--manpath={share}/man", "--where", "vmctl") == f"{share}/man/man1/vmctl.1\n"
    # The installation can be repeated, as after an upgrade.
    installed.run("vmctl", "install-extras", "--user", "--quiet")
    assert len(installed.run("vmctl", "install-extras", "--user", "--remove").splitlines()) == len(made) - 1
    assert contents(installed.home) == before
    assert installed.run("vmctl", "install-extras", "--user", "--remove") == "Nothing is installed.\n"


def test_uninstalling_leaves_nothing(wheel: Path, tmp_path: Path) -> None:
    installation = Installation.make(tmp_path, wheel)
    assert any("vmspawn" in path for path in contents(installation.venv))
    # The command compiles vmspawn's modules. The compiled files must be removed too.
    installation.run("vmctl", "list", "--quiet")
    installation.pip("uninstall", "--yes", "vmspawn")
    assert not {path for path in contents(installation.venv) if "vmspawn" in path or "vmctl" in path}
    assert contents(installation.home) == set()

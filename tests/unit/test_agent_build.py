# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that the agent is compiled once, for the right architecture, and small, and that errors state what to do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from vmspawn.agent import compiler, install
from vmspawn.agent.build import build
from vmspawn.errors import StartError


def needs_a_compiler(architecture: str) -> None:
    if not list(compiler.compilers(architecture)):
        pytest.skip(f"there is no compiler for {architecture}")


@pytest.mark.parametrize("architecture", sorted(compiler.MACHINES))
def test_the_agent_is_compiled_once(architecture: str, tmp_path: Path) -> None:
    needs_a_compiler(architecture)
    path = Path(build(architecture, str(tmp_path)))
    assert compiler.unfit(path, architecture) == ""
    assert path.stat().st_mode & 0o777 == 0o755
    before = path.stat().st_mtime_ns
    assert build(architecture, str(tmp_path)) == str(path)
    assert path.stat().st_mtime_ns == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_agent_is_small_and_needs_no_library(tmp_path: Path) -> None:
    architecture = next((each for each in compiler.MACHINES if compiler.is_native(each)), None)
    if architecture is None:
        pytest.skip("there is no agent for this host's architecture")
    needs_a_compiler(architecture)
    content = Path(build(architecture, str(tmp_path))).read_bytes()
    assert b"ld-linux" not in content
    # SMBIOS tables have at most 64 KiB, for the program in base64 and other credentials.
    assert sum(map(len, install.delivery(content).values())) < 20_000


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="no agent for riscv64") as raised:
        build("riscv64", str(tmp_path))
    assert "x86_64" in raised.value.hint


@pytest.mark.parametrize(("command", "reason"), [("false", "exit status 1"), ("/missing/cc", "No such file")])
def test_without_a_working_compiler_the_error_has_the_reason(
    command: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", command)
    monkeypatch.setenv("PATH", str(tmp_path / "empty") if command != "false" else str(_only(tmp_path, "false")))
    monkeypatch.setattr(compiler, "find_spec", lambda name: None)
    with pytest.raises(StartError, match=reason) as raised:
        build("x86_64", str(tmp_path / "out"))
    assert "set CC" in raised.value.hint
    assert list((tmp_path / "out").iterdir()) == []


def _only(folder: Path, name: str) -> Path:
    path = folder / "bin"
    path.mkdir()
    (path / name).symlink_to(shutil.which(name) or name)
    return path


def test_a_directory_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match="file"):
        build("x86_64", str(tmp_path / "file" / "below"))

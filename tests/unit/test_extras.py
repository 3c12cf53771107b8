# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests installing and removing man pages, completion scripts and the unit: completely or not at all."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmspawn.cli import extras
from vmspawn.cli.extras import Destination, File
from vmspawn.errors import ExtrasError, SystemFailure

UNIT = Path(__file__).parents[2] / "systemd/vmspawn@.service"


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return the contents of a directory: files with their bytes, directories with None."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def sources(tmp_path: Path) -> str:
    """Make extras as in the wheel, one of each kind."""
    folder = tmp_path / "sources"
    for name in ("man/vmctl.1", "bash-completion/vmctl", "zsh/_vmctl", "fish/vmctl.fish"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(f"this is {name}\n")
    (folder / "systemd").mkdir()
    shutil.copy(UNIT, folder / "systemd")
    return str(folder)


@pytest.fixture
def share(tmp_path: Path) -> Path:
    """Make a user's share directory that has a man page of the user."""
    folder = tmp_path / "home" / "share"
    (folder / "man/man1").mkdir(parents=True)
    (folder / "man/man1/own.1").write_text("mine\n")
    return folder


@pytest.fixture
def destination(share: Path, monkeypatch: pytest.MonkeyPatch) -> Destination:
    monkeypatch.setenv("XDG_DATA_HOME", str(share))
    return extras.user_destination()


def wanted(sources: str, destination: Destination) -> list[File]:
    return extras.wanted_files(sources, destination, "/opt/bin/vmspawn")


def test_files_are_installed_where_programs_look_and_removal_leaves_other_files(
    sources: str, destination: Destination, share: Path
) -> None:
    before = contents(share)
    extras.install(wanted(sources, destination), destination.record)
    assert {path for path, data in contents(share).items() if data is not None} == {
        "bash-completion/completions/vmctl",
        "fish/vendor_completions.d/vmctl.fish",
        "man/man1/own.1",
        "man/man1/vmctl.1",
        "systemd/user/vmspawn@.service",
        "vmspawn/extras.json",
        "zsh/site-functions/_vmctl",
    }
    assert (share / "man/man1/vmctl.1").read_text() == "this is man/vmctl.1\n"
    removed, kept = extras.remove(destination.record)
    assert len(removed) == 5
    assert not kept
    assert contents(share) == before


def test_a_second_installation_replaces_the_files_of_the_first(
    sources: str, destination: Destination, share: Path
) -> None:
    before = contents(share)
    extras.install(wanted(sources, destination), destination.record)
    Path(sources, "man/vmctl.1").rename(Path(sources, "man/vmctl2.1"))
    Path(sources, "bash-completion/vmctl").write_text("new\n")
    extras.install(wanted(sources, destination), destination.record)
    assert not (share / "man/man1/vmctl.1").exists()
    assert (share / "man/man1/vmctl2.1").exists()
    assert (share / "bash-completion/completions/vmctl").read_text() == "new\n"
    extras.remove(destination.record)
    assert contents(share) == before


@pytest.mark.parametrize("kind", ["file", "symlink", "folder"])
def test_a_foreign_file_is_not_overwritten_and_nothing_is_installed(
    sources: str, destination: Destination, share: Path, kind: str
) -> None:
    place = share / "man/man1/vmctl.1"
    if kind == "file":
        place.write_text("theirs\n")
    elif kind == "symlink":
        place.symlink_to("own.1")
    else:
        place.mkdir()
    before = contents(share)
    with pytest.raises(ExtrasError, match=r"man1/vmctl\.1: it exists and vmctl has not installed it") as caught:
        extras.install(wanted(sources, destination), destination.record)
    assert caught.value.hint
    assert contents(share) == before


def test_a_file_that_was_changed_is_neither_overwritten_nor_removed(
    sources: str, destination: Destination, share: Path
) -> None:
    extras.install(wanted(sources, destination), destination.record)
    changed = share / "bash-completion/completions/vmctl"
    changed.write_text("changed\n")
    with pytest.raises(ExtrasError):
        extras.install(wanted(sources, destination), destination.record)
    _, kept = extras.remove(destination.record)
    assert kept == [str(changed)]
    assert changed.read_text() == "changed\n"
    assert not (share / "vmspawn").exists()


def test_a_directory_with_files_of_others_is_not_removed(sources: str, destination: Destination, share: Path) -> None:
    extras.install(wanted(sources, destination), destination.record)
    other = share / "zsh/site-functions/_other"
    other.write_text("theirs\n")
    extras.remove(destination.record)
    assert other.exists()
    assert not (share / "fish").exists()


@pytest.mark.parametrize("again", [False, True])
def test_an_error_of_the_system_leaves_all_as_it_was(
    sources: str, destination: Destination, share: Path, again: bool
) -> None:
    if again:
        extras.install(wanted(sources, destination), destination.record)
        Path(sources, "bash-completion/vmctl").write_text("new\n")
    # A file is in the place of the last directory.
    Path(sources, "zsh/_vmctl").write_text("new\n")
    if not again:
        (share / "zsh").write_text("no folder\n")
    else:
        shutil.rmtree(share / "zsh")
        (share / "zsh").write_text("no folder\n")
    before = contents(share)
    with pytest.raises(SystemFailure, match="zsh"):
        extras.install(wanted(sources, destination), destination.record)
    assert contents(share) == before


def test_a_damaged_record_is_reported(sources: str, destination: Destination) -> None:
    record = Path(destination.record)
    record.parent.mkdir()
    record.write_text("{")
    with pytest.raises(ExtrasError, match="damaged"):
        extras.install(wanted(sources, destination), destination.record)
    with pytest.raises(ExtrasError, match="damaged"):
        extras.remove(destination.record)


def test_nothing_is_removed_where_nothing_is_installed(destination: Destination, share: Path) -> None:
    before = contents(share)
    assert extras.remove(destination.record) == ([], [])
    assert contents(share) == before


def test_a_checkout_has_no_extras(destination: Destination, tmp_path: Path) -> None:
    with pytest.raises(ExtrasError, match="checkout") as caught:
        wanted(str(tmp_path / "none"), destination)
    assert "pipx" in caught.value.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="a file of another user needs root")
def test_roots_unit_runs_no_file_of_another_user(destination: Destination, tmp_path: Path) -> None:
    command = tmp_path / "vmspawn"
    command.touch()
    extras.check_command(str(command), extras.system_destination())
    os.chown(command, 65534, 65534)
    extras.check_command(str(command), destination)
    with pytest.raises(ExtrasError, match="belongs to another user") as caught:
        extras.check_command(str(command), extras.system_destination())
    assert "--user" in caught.value.hint


def test_a_relative_data_home_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The XDG base directory specification requires that."""
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert extras.user_destination().share == f"{tmp_path}/.local/share"


def test_a_user_without_a_home_directory_gets_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setenv("HOME", "relative")
    with pytest.raises(ExtrasError, match="no home directory") as caught:
        extras.user_destination()
    assert "XDG_DATA_HOME" in caught.value.hint


def unit_text(sources: str, destination: Destination, command: str) -> str:
    files = extras.wanted_files(sources, destination, command)
    return next(file.data for file in files if file.path.endswith("vmspawn@.service")).decode()


def test_a_users_unit_is_wanted_by_the_users_default_target(sources: str, destination: Destination) -> None:
    assert "WantedBy=default.target" in unit_text(sources, destination, "/opt/vmspawn")
    assert "WantedBy=machines.target" in unit_text(sources, extras.system_destination(), "/opt/vmspawn")


@given(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1).map(lambda text: f"/opt/{text}"))
def test_quoting_a_path_for_the_unit_keeps_the_path(path: str) -> None:
    """The test unquotes by the rules of systemd.syntax(7): specifiers, then quotes and backslashes."""
    quoted = extras._quote_for_unit(path)
    if quoted.startswith('"'):
        assert quoted.endswith('"')
        quoted = quoted[1:-1].replace("\\\\", "\0").replace('\\"', '"').replace("\0", "\\")
    assert quoted.replace("%%", "%") == path


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
@pytest.mark.parametrize("name", ["vmspawn", "with a blank", "100%"])
def test_systemd_reads_the_unit(sources: str, destination: Destination, tmp_path: Path, name: str) -> None:
    command = tmp_path / name
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    unit = tmp_path / "vmspawn@.service"
    unit.write_text(unit_text(sources, destination, str(command)))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    assert "vmspawn@" not in done.stderr

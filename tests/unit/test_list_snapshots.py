# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that `vmctl list-snapshots` reports a directory of snapshots that it cannot read."""

from pathlib import Path

import pytest

from tests.commands import one_line, vmctl


def test_a_directory_that_does_not_exist_yet_has_no_snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMSPAWN_SNAPSHOT_DIR", str(tmp_path / "later"))
    done = vmctl("list-snapshots")
    assert (done.returncode, done.stdout, done.stderr) == (0, "No snapshots.\n", "")


def test_a_directory_in_the_options_has_to_exist(tmp_path: Path) -> None:
    done = vmctl("list-snapshots", f"--snapshot-dir={tmp_path}/none")
    assert (done.returncode, done.stdout) == (1, "")
    failure = f"vmctl: cannot read the directory of snapshots {tmp_path}/none: No such file or directory"
    assert one_line(done, "vmctl") == failure


def test_a_directory_that_cannot_be_read_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VMSPAWN_SNAPSHOT_DIR", str(tmp_path / "file"))
    done = vmctl("list-snapshots")
    assert (done.returncode, done.stdout) == (1, "")
    assert one_line(done, "vmctl") == f"vmctl: cannot read the directory of snapshots {tmp_path}/file: Not a directory"

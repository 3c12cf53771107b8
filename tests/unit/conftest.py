# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keeps unit tests from changing the environment of the tests after them."""

import os

import pytest

from vmspawn.images import snapshot_files


@pytest.fixture(autouse=True)
def unchanged_snapshot_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the directory of snapshots after each test: the parsers' option --snapshot-dir= sets it."""
    monkeypatch.setenv(snapshot_files.VARIABLE, os.environ[snapshot_files.VARIABLE])

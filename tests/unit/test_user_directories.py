# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the user's directories, and users that have none."""

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from vmspawn import user_directories
from vmspawn.user_directories import user_directory

HOME = pwd.getpwuid(os.geteuid()).pw_dir


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"XDG_STATE_HOME": "/x", "HOME": "/h"}, "/x"),
        ({"XDG_STATE_HOME": "", "HOME": "/tmp"}, "/tmp/.local/state"),
        ({"XDG_STATE_HOME": "relative", "HOME": "/tmp"}, "/tmp/.local/state"),
        ({"HOME": ""}, f"{HOME}/.local/state"),
        ({}, f"{HOME}/.local/state"),
        ({"HOME": "relative"}, None),
        ({"HOME": "/proc/nonexistent"}, None),
    ],
)
def test_the_environment_or_the_password_entry_determines_the_directory(
    environment: dict[str, str], found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_STATE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert user_directory("XDG_STATE_HOME", ".local/state") == found


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without a password entry")
def test_a_user_without_a_home_has_no_directories() -> None:
    source = Path(user_directories.__file__).read_text()
    script = f"{source}\nprint(user_directory('XDG_STATE_HOME', 'state'))"
    done = subprocess.run(
        [os.path.realpath(sys.executable), "-I", "-c", script],
        capture_output=True,
        text=True,
        env={},
        user=54321,
        cwd="/",
        check=False,
    )
    assert (done.stdout, done.stderr) == ("None\n", "")

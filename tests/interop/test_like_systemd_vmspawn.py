# SPDX-License-Identifier: LGPL-2.1-or-later
"""Compares vmspawn with systemd-vmspawn: the firmware that both find, and the options that both have."""

import json
import re

import pytest

from tests.interop.box import PROJECT, Box
from vmspawn.cli.spawn.main import build_parser


def options(text: str) -> set[str]:
    """Return the options in the output of --help."""
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text))


def test_every_option_of_systemd_vmspawn_is_known_here(box: Box) -> None:
    theirs = options(box.run("systemd-vmspawn", "--help").stdout)
    # --help lists the supported options only.
    ours = {name for action in build_parser()._actions for name in action.option_strings}
    assert theirs <= ours
    assert "--private-users" in theirs - options(box.run("vmspawn", "--help").stdout)


def test_the_table_of_options_is_complete(box: Box) -> None:
    table = (PROJECT / "docs/compatibility.md").read_text()
    listed = re.findall(r"^\| `(?:-\w, )?(--[\w-]+)", table, re.MULTILINE)
    assert sorted(listed) == sorted(options(box.run("systemd-vmspawn", "--help").stdout))


def test_the_same_firmware_is_listed(box: Box) -> None:
    assert box.run("vmspawn", "--firmware=list").stdout == box.run("systemd-vmspawn", "--firmware=list").stdout
    features = "--firmware-features=list"
    assert box.run("vmspawn", features).stdout == box.run("systemd-vmspawn", features).stdout


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--secure-boot=no"],
        ["--secure-boot=yes"],
        ["--firmware-features=enrolled-keys"],
        ["--firmware-features=~requires-smm"],
    ],
)
def test_the_same_firmware_is_selected(box: Box, arguments: list[str]) -> None:
    ours = json.loads(box.run("vmspawn", "--firmware=describe", *arguments).stdout)
    assert ours == json.loads(box.run("systemd-vmspawn", "--firmware=describe", *arguments).stdout)

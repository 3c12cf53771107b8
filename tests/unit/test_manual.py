# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that the man pages and the table of options are complete and well-formed."""

import argparse
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import vmspawn.cli.ctl.main as vmctl
import vmspawn.cli.spawn.main as vmspawn_command
from docs import man

TESTS = Path(__file__).parents[1]
COMPATIBILITY = TESTS.parent / "docs" / "compatibility.md"


def visible_options(parser: argparse.ArgumentParser) -> set[str]:
    return {
        name
        for action in parser._actions
        if action.help != argparse.SUPPRESS
        for name in action.option_strings
        if name.startswith("--")
    }


@pytest.mark.parametrize(
    ("name", "parser"), [("vmspawn.1", vmspawn_command.build_parser()), ("vmctl.1", vmctl.build_parser())]
)
def test_every_option_is_in_the_man_page(name: str, parser: argparse.ArgumentParser) -> None:
    text = man.pages()[name].replace("\\-", "-")
    missing = {option for option in visible_options(parser) if not re.search(rf"\.B .*{option}\b", text)}
    assert not missing


def test_every_verb_is_in_the_man_page() -> None:
    text = man.pages()["vmctl.1"].replace("\\-", "-")
    assert all(f".B {verb} " in text or f".B {verb}\n" in text for verb in man._subparsers(vmctl.build_parser()))


@pytest.mark.parametrize("name", ["vmspawn.1", "vmctl.1"])
def test_hidden_options_are_in_no_man_page(name: str) -> None:
    text = man.pages()[name]
    assert "SUPPRESS" not in text
    assert not re.search(r"\\-\\-(program|parent\\-pid|ready\\-fd)\b", text)


def test_values_keep_their_spelling() -> None:
    text = man.pages()["vmctl.1"]
    assert "agent, booted, console=REGEX" in text
    assert "Run the command in this directory" in text


def test_no_missing_option_is_documented() -> None:
    assert set(man.details()) <= visible_options(vmspawn_command.build_parser())


@pytest.mark.skipif(not shutil.which("groff"), reason="groff is not installed")
@pytest.mark.parametrize("name", ["vmspawn.1", "vmctl.1"])
def test_groff_has_no_complaint(name: str) -> None:
    done = subprocess.run(
        ["groff", "-man", "-ww", "-z", "-K", "utf8"],
        input=man.pages()[name],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""


def test_the_table_has_each_option_shared_with_systemd_vmspawn() -> None:
    rows = re.findall(
        r"^\| `(?:-\w, )?(--[\w-]+)[^|]*\| (same|differs|not yet|accepted)\b.*\| (.+) \|$",
        COMPATIBILITY.read_text(),
        re.MULTILINE,
    )
    listed = [name for name, _, _ in rows]
    assert len(listed) == len(set(listed))
    known = visible_options(vmspawn_command.build_parser())
    assert {name for name, state, _ in rows if state in ("same", "differs")} <= known
    assert all(tested.strip() for _, _, tested in rows)


def test_the_tests_that_the_tables_name_are_there() -> None:
    for kind, name in re.findall(r"\b(unit|qemu|guest|interop|soak)/(test_\w+)", COMPATIBILITY.read_text()):
        path = TESTS / ("guest" if kind == "soak" else kind) / f"{name}.py"
        assert path.exists(), name
        assert kind != "soak" or "pytest.mark.soak" in path.read_text(), name

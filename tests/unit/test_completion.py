# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the completion scripts: each shell accepts its script, and the script has every verb and option."""

import argparse
import re
import shutil
import subprocess
from collections.abc import Iterable

import pytest

import vmspawn.cli.ctl.main as vmctl
import vmspawn.cli.spawn.main as vmspawn_command
from docs import completion, man
from tests.unit.test_manual import visible_options
from vmspawn.cli.parser import Parser

SCRIPTS = completion.scripts()


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_shell_accepts_its_script(name: str) -> None:
    shell = name.partition("/")[0].removesuffix("-completion")
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    option = "--no-execute" if shell == "fish" else "-n"
    done = subprocess.run([shell, option], input=SCRIPTS[name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def long_options(actions: Iterable[argparse.Action]) -> set[str]:
    return {name for action in actions for name in action.option_strings if name.startswith("--")}


def hidden_options(parser: Parser) -> set[str]:
    """Return the long options that the help omits."""
    groups = [group for group in parser._action_groups if group in parser.hidden_groups]
    return long_options(action for group in groups for action in group._group_actions)


def shown_options(parser: Parser) -> set[str]:
    """Return the long options that the help shows."""
    return visible_options(parser) - hidden_options(parser)


@pytest.mark.parametrize("path", SCRIPTS)
def test_a_script_has_every_option(path: str) -> None:
    verbs = man._subparsers(vmctl.build_parser()).values()
    parsers = [vmspawn_command.build_parser()] if "vmspawn" in path else [vmctl.build_parser(), *verbs]
    prefix = "-l " if path.startswith("fish") else "--"
    for parser in parsers:
        assert isinstance(parser, Parser)
        assert all(prefix + name.removeprefix("--") in SCRIPTS[path] for name in shown_options(parser))


@pytest.mark.parametrize("path", [path for path in SCRIPTS if "vmspawn" in path])
def test_a_script_omits_the_options_that_the_help_omits(path: str) -> None:
    known = set(re.findall(r"(?:--|-l )([a-z][a-z0-9-]*)", SCRIPTS[path]))
    assert not {name.removeprefix("--") for name in hidden_options(vmspawn_command.build_parser())} & known


def test_vmctls_script_has_every_verb_except_the_hidden_verb_that_it_calls() -> None:
    verbs = man._subparsers(vmctl.build_parser())
    bash = next(
        line for line in SCRIPTS["bash-completion/vmctl"].splitlines() if line.startswith("_shtab_vmctl_subparsers=")
    )
    assert set(bash.partition("=")[2].strip("()").split()) == set(verbs)
    topics = f"_shtab_vmctl_help_pos_0_choices=({' '.join(verbs)})"
    assert topics in SCRIPTS["bash-completion/vmctl"].splitlines()


@pytest.mark.parametrize(
    ("metavar", "words"),
    [
        ("BOOL|auto", ["yes", "no", "auto"]),
        ("no|sev-snp|tdx", ["no", "sev-snp", "tdx"]),
        ("FEATURE[,FEATURE…]|list", ["list"]),
        ("BYTES[:MAX[:SLOTS]]", []),
        ("CONDITION", ["agent", "booted", "console=", "disk=", "off", "port=", "ssh"]),
        ("", []),
    ],
)
def test_the_words_of_a_metavar_are_completed(metavar: str, words: list[str]) -> None:
    assert completion._alternatives(metavar) == words

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The completion scripts: each shell reads them, and they know every verb and option."""

import argparse
import shutil
import subprocess

import pytest

import vmspawn.cli.ctl.main as vmctl
import vmspawn.cli.spawn.main as vmspawn_command
from docs import completion, man
from tests.unit.test_manual import visible_options

SCRIPTS = completion.scripts()


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_shell_reads_it(name: str) -> None:
    shell = name.partition("/")[0].removesuffix("-completion")
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    option = "--no-execute" if shell == "fish" else "-n"
    done = subprocess.run([shell, option], input=SCRIPTS[name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("path", "parser"),
    [
        (path, parser)
        for path in SCRIPTS
        for parser in (
            [vmspawn_command.build_parser()]
            if "vmspawn" in path
            else [vmctl.build_parser(), *man._subparsers(vmctl.build_parser()).values()]
        )
    ],
)
def test_it_knows_every_option(path: str, parser: argparse.ArgumentParser) -> None:
    prefix = "-l " if path.startswith("fish") else "--"
    assert all(prefix + name.removeprefix("--") in SCRIPTS[path] for name in visible_options(parser))


def test_it_knows_every_verb_but_its_own() -> None:
    verbs = man._subparsers(vmctl.build_parser())
    bash = next(
        line for line in SCRIPTS["bash-completion/vmctl"].splitlines() if line.startswith("_shtab_vmctl_subparsers=")
    )
    assert set(bash.partition("=")[2].strip("()").split()) == set(verbs)


@pytest.mark.parametrize(
    ("metavar", "words"),
    [
        ("BOOL|auto", ["yes", "no", "auto"]),
        ("no|sev-snp|tdx", ["no", "sev-snp", "tdx"]),
        ("FEATURE[,FEATURE…]|list", ["list"]),
        ("BYTES[:MAX[:SLOTS]]", []),
        ("", []),
    ],
)
def test_the_words_of_a_metavar_are_completed(metavar: str, words: list[str]) -> None:
    assert completion._alternatives(metavar) == words

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes the completion scripts of both commands for bash, zsh and fish, with shtab from the commands' own parsers.

The scripts ask `vmctl __complete` for the names of machines and disks. docs/completion/ has the shell functions that
do so. `python docs/completion.py FOLDER` writes the scripts into FOLDER.
"""

import argparse
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import shtab

import vmspawn.cli.ctl.main as vmctl
import vmspawn.cli.spawn.main as vmspawn_command
from vmspawn.cli.parser import Parser

SOURCES = Path(__file__).parent / "completion"

#: The shells, and the path of a command's script. Each shell looks for a file of that name.
SHELLS = {"bash": "bash-completion/{}", "zsh": "zsh/_{}", "fish": "fish/{}.fish"}

_FILES = frozenset({"PATH", "FILE", "SOCKET", "LISTEN"})

#: What completes the arguments of these names, by shell.
_NAMES = {
    "MACHINE": {"bash": "_vmctl_machines", "zsh": "_vmctl_machines", "fish": "(__vmctl_machines)"},
    "DISK": {"bash": "_vmctl_disks", "zsh": "_vmctl_disks", "fish": "(__vmctl_disks)"},
}

_BOOLEAN = ("yes", "no")


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments of a parser and of its verbs."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from _actions(verb)


def _alternatives(metavar: str) -> list[str]:
    """The words that an option takes, as its metavar lists them: `BOOL|auto` is yes, no and auto."""
    words = metavar.split("|")
    fixed = [word for word in words if re.fullmatch("[a-z][a-z-]*", word)]
    return [*(_BOOLEAN if "BOOL" in words else ()), *fixed]


def _prepare(action: argparse.Action, shell: str) -> None:
    """Tell shtab what completes an argument. The name of an argument says what it is."""
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    if metavar in _FILES:
        action.complete = shtab.FILE  # type: ignore[attr-defined]
    elif metavar in _NAMES:
        action.complete = _NAMES[metavar]  # type: ignore[attr-defined]
    elif not action.choices and (words := _alternatives(metavar)):
        action.choices = words
    if shell == "zsh" and action.nargs != 0:
        # zsh's _arguments then takes both --option=VALUE and --option VALUE.
        action.option_strings = [f"{name}=" if name.startswith("--") else name for name in action.option_strings]


def _hide(parser: Parser) -> None:
    """Leave out the options that the help leaves out."""
    for group in parser._action_groups:
        if group in parser.hidden_groups:
            for action in group._group_actions:
                action.help = argparse.SUPPRESS


def script(parser: Parser, shell: str) -> str:
    """One command's completion script for a shell. Changes the parser."""
    _hide(parser)
    for action in _actions(parser):
        if action.metavar == "VERB" and not action.choices:
            action.choices = list(itertools.chain(*parser.headings.values()))
        _prepare(action, shell)
    lines = shtab.complete(parser, shell).splitlines()
    # shtab begins with comments on how to install the script by hand.
    kept = [line for number, line in enumerate(lines) if number > 10 or not line.startswith("# ")]
    place = 1 if kept[0].startswith("#compdef") else 0
    kept.insert(place, f"# Completion of {parser.prog} in {shell}.")
    functions = (SOURCES / f"functions.{shell}").read_text().replace("@PROGRAM@", parser.prog)
    functions = "\n".join(line for line in functions.splitlines() if not line.startswith("# SPDX"))
    if shell == "bash":
        # The last command is what bash completes with.
        return "\n".join([*kept, functions]) + "\n"
    # A script of zsh ends with a call of the completion.
    return "\n".join([*kept[: place + 1], functions, *kept[place + 1 :]]) + "\n"


def scripts() -> dict[str, str]:
    """All completion scripts by their paths, such as `fish/vmctl.fish`."""
    return {
        path.format(module.build_parser().prog): script(module.build_parser(), shell)
        for shell, path in SHELLS.items()
        for module in (vmspawn_command, vmctl)
    }


def main() -> None:
    """Write the completion scripts."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/completion")
    for name, text in scripts().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        print(folder / name)


if __name__ == "__main__":
    main()

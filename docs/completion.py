# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes the completion scripts of both commands for bash, zsh and fish from the commands' parsers, with shtab.

Shell functions in docs/completion/ complete the names of machines and disks, which `vmctl __complete` prints.
`python docs/completion.py FOLDER` writes the scripts into FOLDER.
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
from vmspawn.inside import conditions

SOURCES = Path(__file__).parent / "completion"

#: The path of a command's script for each shell. Each shell expects that file name.
SHELLS = {"bash": "bash-completion/{}", "zsh": "zsh/_{}", "fish": "fish/{}.fish"}

_FILES = frozenset({"PATH", "FILE", "SOCKET", "LISTEN", "SOURCE", "TARGET"})

#: The shell functions that complete arguments with these metavars.
_NAMES = {
    "MACHINE": {"bash": "_vmctl_machines", "zsh": "_vmctl_machines", "fish": "(__vmctl_machines)"},
    "DISK": {"bash": "_vmctl_disks", "zsh": "_vmctl_disks", "fish": "(__vmctl_disks)"},
    "[USER@]MACHINE": {"bash": "_vmctl_machines", "zsh": "_vmctl_machines", "fish": "(__vmctl_machines)"},
    "MACHINE[@NAME]": {"bash": "_vmctl_snapshots", "zsh": "_vmctl_snapshots", "fish": "(__vmctl_snapshots)"},
    "MACHINE@NAME": {"bash": "_vmctl_snapshots", "zsh": "_vmctl_snapshots", "fish": "(__vmctl_snapshots)"},
}

_BOOLEAN = ("yes", "no")


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the arguments of a parser and of its verbs."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from _actions(verb)


def _alternatives(metavar: str) -> list[str]:
    """Return the words that a metavar lists: yes, no and auto for `BOOL|auto`."""
    if metavar == "CONDITION":
        return [f"{name}=" if value else name for name, value in conditions.KINDS.items()]
    words = metavar.split("|")
    fixed = [word for word in words if re.fullmatch("[a-z][a-z-]*", word)]
    return [*(_BOOLEAN if "BOOL" in words else ()), *fixed]


def _prepare(action: argparse.Action, shell: str) -> None:
    """Tell shtab how to complete an argument, by its metavar."""
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
    """Hide the options that the help does not show."""
    for group in parser._action_groups:
        if group in parser.hidden_groups:
            for action in group._group_actions:
                action.help = argparse.SUPPRESS


def script(parser: Parser, shell: str) -> str:
    """Return a command's completion script for a shell. Changes the parser."""
    _hide(parser)
    for action in _actions(parser):
        if action.metavar == "VERB" and not action.choices:
            action.choices = list(itertools.chain(*parser.headings.values()))
        _prepare(action, shell)
    lines = shtab.complete(parser, shell).splitlines()
    # The first lines are comments on how to install the script by hand.
    kept = [line for number, line in enumerate(lines) if number > 10 or not line.startswith("# ")]
    place = 1 if kept[0].startswith("#compdef") else 0
    kept.insert(place, f"# Completion of {parser.prog} in {shell}.")
    functions = (SOURCES / f"functions.{shell}").read_text().replace("@PROGRAM@", parser.prog)
    functions = "\n".join(line for line in functions.splitlines() if not line.startswith("# SPDX"))
    if shell == "bash":
        # The last `complete` command counts.
        return "\n".join([*kept, functions]) + "\n"
    # A zsh script ends with a call of the completion function.
    return "\n".join([*kept[: place + 1], functions, *kept[place + 1 :]]) + "\n"


def scripts() -> dict[str, str]:
    """Return all completion scripts by their paths, such as `fish/vmctl.fish`."""
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

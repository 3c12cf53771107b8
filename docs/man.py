# SPDX-License-Identifier: LGPL-2.1-or-later
"""Generates the man pages vmspawn(1) and vmctl(1) from the text in docs/man and the commands' parsers.

`python docs/man.py FOLDER` writes them into FOLDER; `./dev man` writes them into build/man.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import vmspawn.cli.ctl.main as vmctl
import vmspawn.cli.spawn.main as vmspawn_command
from vmspawn.cli.parser import option_names
from vmspawn.version import VERSION

SOURCES = Path(__file__).parent / "man"


def escape(text: str) -> str:
    """Escape text for roff(7): hyphens, backslashes, and control characters at the start of a line."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("…", "...")
    return "\\&" + text if text[:1] in (".", "'") else text


def help_of(action: argparse.Action) -> str:
    """Return an option's help as a sentence."""
    text = (action.help or "") % {"default": action.default, "prog": ""}
    # A help that begins with a list of values keeps their spelling.
    is_list = text.partition(" ")[0].endswith(",")
    return f"{text if is_list else text[:1].upper() + text[1:]}."


def details() -> dict[str, str]:
    """Parse docs/man/details; returns the text for each option."""
    found: dict[str, str] = {}
    for block in (SOURCES / "details").read_text().split("\n\n"):
        name, _, text = block.strip().partition("\n")
        if name.startswith("--"):
            found[name] = text
    return found


def _entry(action: argparse.Action, more: dict[str, str]) -> Iterator[str]:
    yield ".TP"
    yield f".B {escape(option_names(action))}"
    yield escape(help_of(action))
    for name in action.option_strings:
        if name in more:
            yield from map(escape, more[name].splitlines())


def _is_shown(action: argparse.Action) -> bool:
    """Return whether an action is an option that the help shows."""
    return bool(action.option_strings) and action.help != argparse.SUPPRESS


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the options of a parser, group by group."""
    more = details()
    for group in parser._action_groups:
        actions = [each for each in group._group_actions if _is_shown(each)]
        if not actions:
            continue
        yield f".SS {escape((group.title or 'Options').capitalize())}"
        for action in actions:
            yield from _entry(action, more)


def verbs(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the verbs of vmctl, each with its arguments and its own options."""
    shared = {name for action in parser._actions for name in action.option_strings}
    for name, verb in _subparsers(parser).items():
        yield ".TP"
        usage = (verb.usage or name).removeprefix("vmctl ").replace(" [OPTION…]", "")
        yield f".B {escape(usage)}"
        yield escape(verb.description or "")
        own = [each for each in verb._actions if _is_shown(each) and not set(each.option_strings) & shared]
        for action in own:
            yield ".br"
            yield f"\\fB{escape(option_names(action))}\\fR: {escape(help_of(action))}"


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return {name: verb for name, verb in action.choices.items() if not name.startswith("__")}
    return {}


def page(name: str, parser: argparse.ArgumentParser) -> str:
    """Return one man page. In its source, the lines @OPTIONS@ and @VERBS@ stand for the parser's options and verbs."""
    lines = [f'.TH {name.upper()} 1 "" "vmspawn {VERSION}" "vmspawn"']
    for line in (SOURCES / f"{name}.man").read_text().splitlines():
        match line:
            case "@OPTIONS@":
                lines += options(parser)
            case "@VERBS@":
                lines += verbs(parser)
            case _ if line.startswith('.\\" SPDX'):
                lines.insert(0, line)
            case _:
                lines.append(re.sub(r"(?<![\\])-", r"\\-", line))
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """Return all man pages by their file names."""
    return {
        "vmspawn.1": page("vmspawn", vmspawn_command.build_parser()),
        "vmctl.1": page("vmctl", vmctl.build_parser()),
    }


def main() -> None:
    """Write the man pages."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/man")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text)
        print(folder / name)


if __name__ == "__main__":
    main()

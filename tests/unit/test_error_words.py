# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that errors are leaves of one tree, name fields instead of options, and take untrusted text as values only.

Outside cli/, no string contains an option, except

- an argument of another program, in the files that start programs;
- a command that is named with its options, for example `see: vmspawn --firmware=list`.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmspawn import errors
from vmspawn.boot.config import MachineConfig
from vmspawn.cli.spawn.main import build_parser
from vmspawn.cli.spelling import as_option

PACKAGE = Path(__file__).parents[2] / "src" / "vmspawn"
FILES = sorted(PACKAGE.rglob("*.py"))
#: pytest's plugin has a command line of its own.
BELOW = [path for path in FILES if path.relative_to(PACKAGE).parts[0] not in ("cli", "pytest_plugin.py")]

#: Files that start programs, and have the programs' options.
STARTERS = {
    *("agent/compiler.py", "helpers/virtiofsd.py", "host/scope.py", "guest/packages.py"),
    *("boot/qemu.py", "snapshots/background.py"),
}

#: Files with scripts for the guest's shell. The scripts begin with a line feed.
SCRIPTS = {"inside/copying.py", "inside/waiting.py"}

COMMAND = re.compile(r"\b(vmctl|vmspawn|qemu-img) [^;,)]*")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
PLACEHOLDER = re.compile(r"\{([a-z_.]+)=")


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def strings(path: Path) -> Iterator[str]:
    """Yield the strings of a file, except docstrings."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


@pytest.mark.parametrize("path", BELOW, ids=name_of)
def test_no_message_below_the_command_line_spells_an_option(path: Path) -> None:
    for text in strings(path):
        is_argument = name_of(path) in STARTERS and text.startswith("-")
        is_script = name_of(path) in SCRIPTS and text.startswith("\n")
        assert is_argument or is_script or not OPTION.search(COMMAND.sub("", text)), text


def raised(path: Path) -> Iterator[ast.Call]:
    """Yield the calls that make an error from templates."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "with_fields":
            yield node


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_untrusted_text_is_never_in_a_template(path: Path) -> None:
    for call in raised(path):
        templates = [*call.args, *(each.value for each in call.keywords if each.arg == "hint")]
        assert not any(isinstance(node, ast.JoinedStr) for each in templates for node in ast.walk(each))


#: Parameters of the calls that change a disk or copy files, for which vmctl has options.
OF_CALLS = {"shrink", "force", "skip_special"}
#: Fields that only the command line reads.
OF_COMMAND_LINE = {"set_credential", "load_credential"}


def fields() -> set[str]:
    """Return the fields that templates name."""
    return {found for path in BELOW for text in strings(path) for found in PLACEHOLDER.findall(text)}


@pytest.mark.parametrize("field", sorted(fields() - OF_CALLS - OF_COMMAND_LINE))
def test_each_field_of_an_error_is_the_configurations_and_has_an_option(field: str) -> None:
    first, _, second = field.partition(".")
    assert first in MachineConfig._fields
    value = MachineConfig._field_defaults[first]
    assert not second or value is None or second in value._fields
    assert as_option("vmspawn", field).rstrip("=") in build_parser()._option_string_actions


def test_the_errors_are_leaves_of_one_tree() -> None:
    roots = {errors.VmspawnError, errors.StartError}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and node.exc is not None:
                name = ast.unparse(node.exc).partition("(")[0].rpartition(".")[2]
                assert name != "VmspawnError", f"{path}:{node.lineno}"
    assert all(each.__doc__ for root in roots for each in root.__subclasses__())

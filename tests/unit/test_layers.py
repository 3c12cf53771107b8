# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the layers: the imports that each may have, and the modules that must not load before QEMU's start."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmspawn.manager.preload import MODULES

PACKAGE = Path(__file__).parents[2] / "src" / "vmspawn"

#: The layers from the top down. A module may import from its own layer and from those below.
LAYERS = [
    "cli",
    "pytest_plugin",
    "testing",
    "sync",
    "api",
    "manager",
    "control",
    "snapshots",
    "inside",
    "machine",
    "boot",
    "network",
    "storage",
    "hotplug",
    "qmp",
    "console",
    "helpers",
    "host",
    "guest",
    "agent",
    "images",
    "archive",
    "aio",
    "fingerprint",
    "cache",
    "timeouts",
    "log",
    "errors",
    "text",
    "sizes",
    "user_directories",
    "search_path",
    "record",
    "version",
]
#: Layers that must not import from each other.
APART = {"qmp", "console", "host", "guest", "images", "archive"}

#: Modules that take long to load, and that neither command needs at its start.
SLOW = {"asyncio", "asyncvarlink", "msgspec", "dataclasses", "subprocess", "hashlib", "pathlib", "inspect"}


def layer_of(module: tuple[str, ...]) -> str:
    return module[0] if module else ""


def imports(path: Path) -> set[str]:
    """Return the layers that a file imports from, including imports inside functions."""
    home = path.relative_to(PACKAGE).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = home[: len(home) - node.level]
            names = [*node.module.split(".")] if node.module else []
            targets = [(*base, *names)] if names or base else [(alias.name,) for alias in node.names]
            found |= {layer_of(target) for target in targets}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vmspawn"):
            parts = (node.module or "").split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
    return found - {""}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_its_layer_and_below(path: Path) -> None:
    home = layer_of(path.relative_to(PACKAGE).with_suffix("").parts)
    if home in ("__init__", "__main__"):
        return
    for target in imports(path):
        assert LAYERS.index(target) >= LAYERS.index(home), f"{home} imports {target}"
        if home in APART and target in APART:
            assert target == home, f"{home} imports {target}"


def modules_of(package: Path) -> dict[str, set[str]]:
    """Return each module of the package with its relative imports, including imports inside functions."""
    files = {".".join(path.relative_to(package).with_suffix("").parts): path for path in package.rglob("*.py")}
    return {name: set(imported_modules(name, path, set(files))) - {name} for name, path in files.items()}


def imported_modules(name: str, path: Path, modules: set[str]) -> Iterator[str]:
    return imported_in(ast.parse(path.read_text()), name, modules)


def imported_in(tree: ast.AST, name: str, modules: set[str]) -> Iterator[str]:
    home = name.split(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*home[: len(home) - node.level], *(node.module or "").split(".")]
            parent = ".".join(filter(None, base))
            for alias in node.names:
                child = f"{parent}.{alias.name}" if parent else alias.name
                yield from ({child, parent} & modules) if child not in modules else {child}


def import_cycles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other directly or indirectly, each sorted."""
    reached: dict[str, set[str]] = {name: set(found) for name, found in imports.items()}
    changed = True
    while changed:
        changed = False
        for name, found in reached.items():
            more = found.union(*(reached[other] for other in found))
            changed |= more != found
            reached[name] = more
    groups = {tuple(sorted(o for o in reached if name in reached[o] and o in reached[name])) for name in reached}
    return sorted(list(group) for group in groups if group)


def test_import_cycles_are_found() -> None:
    assert import_cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert import_cycles({"a": {"b"}, "b": set()}) == []


def test_no_modules_import_each_other() -> None:
    """This includes imports inside functions and for type checkers."""
    assert import_cycles(modules_of(PACKAGE)) == []


#: The layers that hot-plug, and its users other than disks, may import from.
_MECHANISM = {"hotplug", "qmp", "host", "aio", "log", "errors", "record", "text"}


@pytest.mark.parametrize("pattern", ["hotplug/*.py", "inside/ports.py"])
def test_hotplug_is_independent_of_disks(pattern: str) -> None:
    files = sorted(PACKAGE.glob(pattern))
    assert files
    for path in files:
        assert imports(path) <= _MECHANISM | {path.parent.name}, path


#: Modules that are imported inside functions, but only before a machine is ready.
_OF_THE_START = {"agent.compiler", "storage.recovery", "console.interactive", "manager.keys", "inside.identity"}

#: Layers whose functions run while a machine runs.
_AT_WORK = (
    "manager",
    "control",
    "machine",
    "inside",
    "agent",
    "storage",
    "hotplug",
    "qmp",
    "console",
    "host",
    "images",
)


def late_imports(path: Path, modules: set[str]) -> set[str]:
    """Return the package's modules that a file imports inside functions."""
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    functions = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return {found for function in functions for found in imported_in(function, name, modules)}


def test_late_imports_are_loaded_before_a_machine_is_ready() -> None:
    """The package may be uninstalled while a machine runs."""
    modules = set(modules_of(PACKAGE))
    late = {
        found
        for path in PACKAGE.rglob("*.py")
        if layer_of(path.relative_to(PACKAGE).parts) in _AT_WORK
        for found in late_imports(path, modules)
    }
    assert "qmp.share.multiplexer" in late
    assert late - _OF_THE_START == late & set(MODULES)


@pytest.mark.parametrize("module", ["vmspawn.cli.spawn.main", "vmspawn.cli.ctl.main"])
def test_the_commands_load_no_unneeded_module(module: str) -> None:
    script = f"import sys; before = set(sys.modules); import {module}; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert module in loaded
    assert not loaded & SLOW


@pytest.mark.parametrize("command", ["spawn", "ctl"])
def test_an_entry_point_loads_nothing_before_it_is_called(command: str) -> None:
    """A module that is loaded before that prints a traceback if SIGINT interrupts it."""
    module = f"vmspawn.cli.{command}.__main__"
    script = f"import sys; before = set(sys.modules); import {module}; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert set(done.stdout.split()) == {"vmspawn", "vmspawn.cli", f"vmspawn.cli.{command}", module}


#: A program that prints the classes that the start of vmspawn creates slowly: named tuples that are not Records, and
#: classes whose string annotations `typing` has compiled.
_COMPILED = """
import sys, typing
import vmspawn.cli.spawn.main
for name, module in sorted(sys.modules.items()):
    for value in vars(module).values() if name.startswith("vmspawn") else ():
        if isinstance(value, type) and value.__module__ == name:
            if type(value) is type and hasattr(value, "_field_defaults"):
                print(value)
            if any(isinstance(each, typing.ForwardRef) for each in vars(value).get("__annotations__", {}).values()):
                print(value)
"""


def test_no_class_takes_long_to_create_before_qemu_is_started() -> None:
    """`from __future__ import annotations` makes annotations strings, which TypedDict compiles."""
    done = subprocess.run([sys.executable, "-c", _COMPILED], check=True, capture_output=True, text=True)
    assert not done.stdout


#: Files that name the guest's shell, which runs commands in the guest.
GUESTS_SHELL = {
    PACKAGE / path
    for path in (
        *("api/execution.py", "cli/spawn/run_command.py", "inside/copying.py", "inside/identity.py"),
        *("inside/waiting.py",),
    )
}


def called(tree: ast.AST) -> set[str]:
    """Return the names of the functions that a file calls, and of the keyword arguments."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {node.func.attr for node in calls if isinstance(node.func, ast.Attribute)}
    names |= {node.func.id for node in calls if isinstance(node.func, ast.Name)}
    return names | {keyword.arg for node in calls for keyword in node.keywords if keyword.arg}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_program_is_run_by_a_shell(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not called(tree) & {"shell", "system", "popen", "getoutput", "getstatusoutput", "create_subprocess_shell"}
    # The guest's scripts have a shell of their own.
    if layer_of(path.relative_to(PACKAGE).parts) != "guest" and path not in GUESTS_SHELL:
        words = {str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert not {os.path.basename(word) for word in words} & {"sh", "bash", "dash"}

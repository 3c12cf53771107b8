# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writes src/vmspawn/sync.py: the asynchronous library's classes with blocking calls, method by method.

`./dev check --fix` runs it, and tests/unit/test_sync.py fails if sync.py is not up to date. The wrappers have no
behaviour of their own: each passes its arguments on.
"""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

TARGET = Path(__file__).parents[1] / "src" / "vmspawn" / "sync.py"

HEADER = '''# SPDX-License-Identifier: LGPL-2.1-or-later
# Made by tools/make_sync.py from vmspawn/api; do not edit.
"""Offers the classes of `vmspawn` with blocking calls, for scripts, tests and the interactive interpreter.

    import vmspawn.sync

    with vmspawn.sync.Machine(guest="builtin", ram="512M") as machine:
        machine.console.expect("ready", timeout=60)

The coroutines run on one event loop in a thread of its own. Any thread may make calls. A call that Ctrl-C interrupts is
cancelled, and cleans up before KeyboardInterrupt is raised. A machine is ended when its `with` block is left, or else
when the process exits. A child of fork(2) cannot use its parent's machines, and does not end them.
"""
'''

#: The wrapped classes: the module in vmspawn.api, the class, and the base of the wrapper.
CLASSES = [
    ("machine", "Machine", "BlockingMachine"),
    ("machine", "Snapshot", "Blocking"),
    ("connect", "ConnectedMachine", "Blocking"),
    ("console", "Console", "Blocking"),
    ("events", "Events", "Blocking"),
    ("control", "Qmp", "Blocking"),
]
FUNCTIONS = [("connect", "connect")]

#: Wrappers that are written by hand, since they wrap asyncio's streams too: the class, and its module.
WRITTEN = {"Execution": ".api.blocking_execution"}

#: Methods that only other modules of vmspawn call.
HIDDEN = {"Console": {"show", "shows", "finish", "is_full"}}

WRAPPED = {name for _, name, _ in CLASSES}
MACHINES = {name for _, name, base in CLASSES if base == "BlockingMachine"}

_CONTEXT = re.compile(r"AbstractAsyncContextManager\[(.*)\]")
_ITERATOR = re.compile(r"AsyncIterator\[(.*)\]")


class Kind:
    """The kind of value that a method returns, in the asynchronous library and in the library with blocking calls."""

    def __init__(self, annotation: str) -> None:
        self.source = annotation
        self.is_context = self.is_iterator = False
        inner = annotation
        if found := _CONTEXT.fullmatch(inner):
            self.is_context, inner = True, found[1]
        if found := _ITERATOR.fullmatch(inner):
            self.is_iterator, inner = True, found[1]
        name = inner.partition("[")[0]
        self.wrapper = name if name in WRAPPED or name in WRITTEN else ""
        self.inner = self.wrapper or inner

    @property
    def blocking(self) -> str:
        """The annotation of the wrapper's method."""
        name = f"Iterator[{self.inner}]" if self.is_iterator else self.inner
        return f"AbstractContextManager[{name}]" if self.is_context else name

    def wrap(self, value: str) -> str:
        """Return the expression that converts an asynchronous value to a blocking one."""
        convert = "blocking_iterator" if self.is_iterator else self.wrapper
        if self.wrapper in MACHINES:
            # The wrapper's constructor would make another machine.
            convert = f"{self.wrapper}._around"
        if self.is_context:
            return f"BlockingContext({value}, {convert})"
        return f"{convert}({value})" if convert else value


def blocking_text(text: str) -> str:
    """Return documentation without the words of asyncio."""
    text = re.sub(r"\bawait |\basync (?=with|for)", "", text)
    return re.sub(r"\bvmspawn\.(?=Machine\(|connect\()", "vmspawn.sync.", text)


def document(node: ast.AST, indent: str) -> str:
    """Return the docstring of a definition as source text."""
    assert isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    text = ast.get_docstring(node) or ""
    quoted = blocking_text(text).replace("\\", "\\\\").replace('"""', r"\"\"\"")
    lines = "\n".join(f"{indent}{line}" if line else "" for line in quoted.splitlines()).lstrip()
    end = f"\n{indent}" if "\n" in lines else ""
    return f'{indent}"""{lines}{end}"""\n'


def passed(arguments: ast.arguments) -> str:
    """Return the arguments of a call that passes on a method's arguments."""
    words = [each.arg for each in (*arguments.posonlyargs, *arguments.args) if each.arg != "self"]
    if arguments.vararg:
        words.append(f"*{arguments.vararg.arg}")
    words += [f"{each.arg}={each.arg}" for each in arguments.kwonlyargs]
    if arguments.kwarg:
        words.append(f"**{arguments.kwarg.arg}")
    return ", ".join(words)


def decorators(node: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    return {ast.unparse(each) for each in node.decorator_list}


def method(node: ast.FunctionDef | ast.AsyncFunctionDef, *, is_overloaded: bool) -> str:
    """Return the source text of a method of a wrapper."""
    is_coroutine = isinstance(node, ast.AsyncFunctionDef)
    marks = decorators(node)
    annotation = ast.unparse(node.returns) if node.returns else "None"
    if "asynccontextmanager" in marks:
        found = _ITERATOR.fullmatch(annotation)
        assert found
        annotation, is_coroutine = f"AbstractAsyncContextManager[{found[1]}]", False
    kind = Kind("AbstractAsyncContextManager[AsyncIterator[Event]]" if annotation == "_Stream" else annotation)
    head = f"    def {node.name}({ast.unparse(node.args)}) -> {kind.blocking}:\n"
    if "overload" in marks:
        return f"    @overload\n{head}        ...\n"
    if "property" in marks:
        value = f"self._read(lambda inner: inner.{node.name})"
        head = f"    @property\n{head}"
    else:
        verb = "_call" if is_coroutine else "_read"
        target = "inner" if node.name == "__call__" else f"inner.{node.name}"
        value = f"self.{verb}(lambda inner: {target}({passed(node.args)}))"
    if is_overloaded:
        # A type checker finds no overload that matches the implementation's arguments.
        value = value.replace(" inner.", " cast(Any, inner).", 1)
        return f"{head}{document(node, ' ' * 8)}        found: {kind.blocking} = {value}\n        return found\n"
    return f"{head}{document(node, ' ' * 8)}        return {kind.wrap(value)}\n"


def inherited(wrapped: type) -> Iterator[ast.stmt]:
    """Yield the definitions in a class's bases that are in vmspawn.api."""
    for base in wrapped.__mro__[1:]:
        if base.__module__.startswith("vmspawn.api."):
            tree = ast.parse(inspect.getsource(base)).body[0]
            assert isinstance(tree, ast.ClassDef)
            yield from tree.body


def is_public(name: str) -> bool:
    return not name.startswith("_") or name == "__call__"


def wrapper(module: ModuleType, name: str, base: str) -> str:
    """Return the source text of the wrapper of a class."""
    tree = ast.parse(inspect.getsource(getattr(module, name))).body[0]
    assert isinstance(tree, ast.ClassDef)
    generic = "[Any]" if any(ast.unparse(each).startswith("Generic") for each in tree.bases) else ""
    inner = f"_{module.__name__.rpartition('.')[2]}.{name}{generic}"
    body = [f"class {name}({base}[{inner}]):\n{document(tree, '    ')}"]
    overloaded: set[str] = set()
    for node in (*tree.body, *inherited(getattr(module, name))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or "abstractmethod" in decorators(node):
            continue
        if base == "BlockingMachine" and node.name == "__init__":
            new = f"super().__init__({inner}({passed(node.args)}))"
            body.append(f"    def __init__({ast.unparse(node.args)}) -> None:\n        {new}\n")
        elif node.name == "__aenter__":
            body.append(
                "    def __enter__(self) -> Self:\n"
                "        self._enter(lambda inner: inner.__aenter__())\n        return self\n"
            )
        elif node.name == "__aexit__":
            body.append(
                "    def __exit__(self, *_: object) -> None:\n        self._exit(lambda inner: inner.__aexit__())\n"
            )
        elif is_public(node.name) and node.name not in HIDDEN.get(name, ()):
            body.append(method(node, is_overloaded=node.name in overloaded))
            overloaded |= {node.name} if "overload" in decorators(node) else set()
    return "\n".join(body)


def function(module: ModuleType, name: str) -> str:
    """Return the source text of the wrapper of a function that returns an asynchronous context manager."""
    tree = ast.parse(inspect.getsource(getattr(module, name))).body[0]
    assert isinstance(tree, ast.AsyncFunctionDef)
    assert decorators(tree) == {"asynccontextmanager"}
    found = _ITERATOR.fullmatch(ast.unparse(tree.returns) if tree.returns else "")
    assert found
    kind = Kind(f"AbstractAsyncContextManager[{found[1]}]")
    value = kind.wrap(f"_{module.__name__.rpartition('.')[2]}.{name}({passed(tree.args)})")
    head = f"def {name}({ast.unparse(tree.args)}) -> {kind.blocking}:\n"
    return f"{head}{document(tree, '    ')}    return {value}\n"


#: Names that the generated text may use in addition to those of the wrapped modules, and the modules that define them.
_MODULES_OF_NAMES = {
    "Any": "typing",
    "Self": "typing",
    "cast": "typing",
    "overload": "typing",
    "AbstractContextManager": "contextlib",
    "Iterator": "collections.abc",
    "Blocking": ".api.blocking",
    "BlockingMachine": ".api.blocking",
    "BlockingContext": ".api.blocking",
    "blocking_iterator": ".api.blocking",
    "Event": ".qmp.events",
    **WRITTEN,
}


def imports(text: str, modules: list[ModuleType]) -> str:
    """Return the imports that a text needs, from the modules that the wrapped modules import from."""
    tree = ast.parse(text)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    lines_by_name = {name: line for module in modules for name, line in imported(module)}
    lines_by_name |= {name: f"from {home} import {name}" for name, home in _MODULES_OF_NAMES.items()}
    made = {f"_{module.__name__.rpartition('.')[2]}" for module in modules}
    lines = {f"from .api import {name[1:]} as {name}" for name in used & made}
    lines |= {lines_by_name[name] for name in used if name in lines_by_name and name not in WRAPPED}
    return "\n".join(sorted(lines))


def imported(module: ModuleType) -> Iterator[tuple[str, str]]:
    """Yield the names that a module of vmspawn.api imports or defines, with the line that imports them here."""
    home = f".api.{module.__name__.rpartition('.')[2]}"
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ImportFrom):
            place = {0: "", 1: ".api.", 2: "."}[node.level] + (node.module or "")
            yield from ((alias.name, f"from {place} import {alias.name}") for alias in node.names if not alias.asname)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, f"import {alias.name}") for alias in node.names)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, f"from {home} import {node.target.id}"
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            yield from ((name, f"from {home} import {name}") for name in names)
        elif isinstance(node, ast.ClassDef):
            yield node.name, f"from {home} import {node.name}"


def make() -> str:
    """Return the text of the module."""
    commands = importlib.import_module("vmspawn.api.commands")
    modules = {name: importlib.import_module(f"vmspawn.api.{name}") for name in dict.fromkeys(m for m, *_ in CLASSES)}
    parts = [wrapper(modules[module], name, base) for module, name, base in CLASSES]
    parts += [function(modules[module], name) for module, name in FUNCTIONS]
    names = sorted([*WRAPPED, *WRITTEN, *(name for _, name in FUNCTIONS)])
    parts.append("def __dir__() -> list[str]:\n    return list(__all__)\n")
    body = "\n\n".join(parts)
    text = "\n".join(
        (
            HEADER,
            "from __future__ import annotations\n",
            imports(body, [*modules.values(), commands]),
            f"__all__ = {names!r}\n",
            "#: pytest omits functions of this module from its tracebacks.\n__tracebackhide__ = True\n\n",
            body,
        )
    )
    return formatted(text)


def formatted(text: str) -> str:
    """Return the text as ruff formats it."""
    for command in (["check", "--fix-only", "--quiet", "--select=I,F401"], ["format"]):
        run = [sys.executable, "-m", "ruff", *command, f"--stdin-filename={TARGET}", "-"]
        text = subprocess.run(run, input=text, capture_output=True, text=True, check=True).stdout
    return text


if __name__ == "__main__":
    if (made := make()) != (TARGET.read_text() if TARGET.exists() else ""):
        TARGET.write_text(made)

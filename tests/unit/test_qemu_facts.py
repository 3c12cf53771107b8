# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that docs/qemu.md, the comments that cite it, and the tests that it names are consistent."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FACTS = ROOT / "docs" / "qemu.md"

#: A citation, for example `docs/qemu.md, "Unplug"`. In a comment it may continue in the next line.
_CITATION = re.compile(r'docs/qemu\.md,(?:\s|#:?)+"([^"]+)"')
_TEST = re.compile(r"\b(unit|qemu|guest|interop)/(test_\w+)(?:::(test_\w+))?")


def headings() -> set[str]:
    return set(re.findall(r"^#{2,3} (.+)$", FACTS.read_text(), re.MULTILINE))


def sources() -> list[Path]:
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "docs").rglob("*.md")]
    return sorted(path for path in files if path != Path(__file__))


def test_every_citation_names_a_heading() -> None:
    cited = {(path.name, heading) for path in sources() for heading in _CITATION.findall(path.read_text())}
    assert cited
    assert not {(name, heading) for name, heading in cited if heading not in headings()}


def test_no_notes_outside_of_the_repository_are_cited() -> None:
    """A reader cannot look up a file that is not in the repository."""
    notes = re.compile(r"\b(QMP|HOTPLUG|FORK|GUEST|VSOCK|VARLINK|DESIGN|HOUSE|WORDS|STYLE)\.md")
    assert not {path.name for path in sources() if notes.search(path.read_text())}


def test_every_test_that_is_named_exists() -> None:
    named = set(_TEST.findall(FACTS.read_text()))
    assert named
    for folder, file, test in named:
        tree = ast.parse((ROOT / "tests" / folder / f"{file}.py").read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert not test or test in functions, f"{folder}/{file} has no {test}"


def test_every_row_is_whole() -> None:
    """A row that lacks a column hides the version or the test."""
    rows = [line for line in FACTS.read_text().splitlines() if line.startswith("|")]
    assert rows
    assert not [row for row in rows if len(re.split(r"(?<!\\)\|", row)) not in (5, 6)]

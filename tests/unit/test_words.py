# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the words of docstrings and documents."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src" / "vmspawn").rglob("*.py"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])

#: A docstring begins with a verb or a noun, never with one of these words.
OPENINGS = re.compile(r"(What|Who|Whoever|Where|How|Why|Whether|That|Those|Such)\b")
#: Words that hide the noun that they stand for.
UNCLEAR = re.compile(r"\b(whoever|thereof|that which|those of ours|have it that)\b", re.IGNORECASE)


def docstrings(path: Path) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]
    return [text for text in map(ast.get_docstring, nodes) if text]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src" / "vmspawn")))
def test_docstrings_say_what_code_does(path: Path) -> None:
    assert [text for text in docstrings(path) if OPENINGS.match(text)] == []
    assert UNCLEAR.findall(path.read_text()) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_their_subjects(path: Path) -> None:
    assert UNCLEAR.findall(path.read_text()) == []

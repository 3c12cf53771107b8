# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the words of docstrings and documents, and that examples are valid."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src" / "vmspawn").rglob("*.py"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])

#: A docstring begins with a verb or a noun, never with one of these words.
OPENINGS = re.compile(r"(What|Who|Whoever|Where|How|Why|Whether|That|Those|Such)\b")
#: Words that hide the noun that they stand for.
UNCLEAR = re.compile(r"\b(whoever|thereof|that which|those of ours|have it that)\b", re.IGNORECASE)
#: Words of everyday speech, for which the field has exact terms: an actor (manager, client, user), vmspawn, directory,
#: continue, be based on, permanently, leave, cancel.
EVERYDAY = re.compile(
    r"\b(somebody|nobody|everybody|anybody|we|us|our|ours|folders?|go on|goes on|machine runs on|stands? on|for good|"
    r"lets? go of|taken? back)\b",
    re.IGNORECASE,
)


def docstrings(path: Path) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]
    return [text for text in map(ast.get_docstring, nodes) if text]


def unquoted(text: str) -> str:
    """Return a text without names in code, messages and names of tests."""
    return re.sub(r"`[^`]*`|\"[^\"\n]*\"|\b\w+::\w+", "", text)


def comments(path: Path) -> list[str]:
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src" / "vmspawn")))
def test_docstrings_say_what_code_does(path: Path) -> None:
    assert [text for text in docstrings(path) if OPENINGS.match(text)] == []
    assert UNCLEAR.findall(path.read_text()) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src" / "vmspawn")))
def test_docstrings_and_comments_use_terms_of_the_field(path: Path) -> None:
    texts = map(unquoted, [*docstrings(path), *comments(path)])
    assert [text for text in texts if EVERYDAY.search(text)] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_their_subjects(path: Path) -> None:
    assert UNCLEAR.findall(path.read_text()) == []
    assert [line for line in path.read_text().splitlines() if EVERYDAY.search(unquoted(line))] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_examples_in_python_are_valid(path: Path) -> None:
    """Only some examples are run, and those need a guest."""
    for example in re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE):
        compile(example, path.name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)

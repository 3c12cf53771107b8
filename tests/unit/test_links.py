# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the documents' links to each other, and the files that they name."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.test_layers import LAYERS

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def anchors(document: Path) -> Iterator[str]:
    """Yield the anchors of a document's headings, as GitHub makes them."""
    for title in re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


def files_in_architecture() -> list[str]:
    """Return the Python files that docs/architecture.md names."""
    return sorted(set(re.findall(r"`([\w/]+\.py)`", (ROOT / "docs" / "architecture.md").read_text())))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_existing_files_and_headings(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_the_table_of_layers_is_complete() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert [each for each in LAYERS if f"`{each}/`" not in text and f"`{each}.py`" not in text] == []


@pytest.mark.parametrize("name", files_in_architecture())
def test_architecture_names_files_that_exist(name: str) -> None:
    assert (ROOT / name).exists() or any((ROOT / "src" / "vmspawn").rglob(name))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_tests_that_documents_name_exist(document: Path) -> None:
    names = set(re.findall(r"\b(?:unit|qemu|guest|interop)/test_\w+", document.read_text()))
    assert [each for each in sorted(names) if not (ROOT / "tests" / f"{each}.py").exists()] == []

"""What the documents name is there: a claim whose test is gone is a claim that nobody checks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *ROOT.glob("*/README.md"), *(ROOT / "docs").glob("*.md")]
TESTS = {path.name for path in (ROOT / "tests").rglob("test_*.py")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_test_that_a_page_names_is_there(page: Path) -> None:
    named = re.findall(r"`((?:[a-z_0-9]+/)*)(test_[a-z_0-9]+\.py)`", page.read_text(encoding="utf-8"))
    assert not {folder + name for folder, name in named if not _is_there(folder, name)}


def _is_there(folder: str, name: str) -> bool:
    if not folder:
        return name in TESTS
    return any((base / folder / name).is_file() for base in (ROOT, ROOT / "tests"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_page_that_a_page_links_to_is_there(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert not {link for link in links if not (page.parent / link).exists()}

"""Every python block of the documentation runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lla_callbacks
from tests.kinds import KINDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}:{number}")
    for page in PAGES
    for number, block in enumerate(BLOCK.findall(page.read_text()))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "<docs>", "exec", dont_inherit=True), {"__name__": "docs"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


NAMED = re.findall(r"`(tests/[\w/]+\.py)::([^`]+)`", (ROOT / "docs" / "works.md").read_text())


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_every_test_that_backs_a_row_exists(file: str, name: str) -> None:
    if file == "tests/kinds.py":
        assert name in [kind.name for kind in KINDS]
    else:
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE)


def test_every_row_names_a_test() -> None:
    rows = re.findall(r"^\| .* \|$", (ROOT / "docs" / "works.md").read_text(), re.MULTILINE)
    backed = [row for row in rows if re.search(r"\| (exact|by difference|refused) \|", row)]
    assert [row for row in backed if "::" not in row] == []
    assert len(backed) > 30


def test_the_api_page_holds_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    listed = re.findall(r"^\.\. auto(?:class|function):: lla_callbacks\.(\w+)$", page, re.MULTILINE)
    assert sorted(listed) == sorted(set(lla_callbacks.__all__) - {"__version__"})


def test_every_page_is_in_the_navigation() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    inside = re.search(r"```\{toctree\}\n:hidden:\n\n(.*?)```", index, re.DOTALL)
    assert inside is not None
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    assert set(inside[1].split()) == pages | {"benchmarks/index"}


def test_the_pages_have_blocks() -> None:
    assert len(BLOCKS) > 5

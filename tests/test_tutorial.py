"""The tutorial runs as it stands, in few steps, and its page is what its script says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def maker() -> Any:
    spec = importlib.util.spec_from_file_location("tutorial", ROOT / "docs" / "make_tutorial.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_the_page_holds_every_cell_in_order() -> None:
    page, at = (ROOT / "docs" / "tutorial.md").read_text(), 0
    for kind, text in maker().cells_of((ROOT / "examples" / "tutorial.py").read_text()):
        at = page.find(text, at)
        assert at >= 0, f"make tutorial: the page lacks a {kind} cell, {text[:60]!r}"


def test_every_cell_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUTORIAL_STEPS", "10")
    made, names, pictures = maker(), {"__name__": "tutorial"}, 0
    for kind, text in made.cells_of((ROOT / "examples" / "tutorial.py").read_text()):
        if kind == "code":
            _, value = made.executed(text, names)
            pictures += hasattr(value, "savefig")
    assert pictures == 5

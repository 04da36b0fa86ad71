"""What is published: the address of the repository, and the citation."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from lla_callbacks import __version__

ROOT = Path(__file__).parents[1]


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci" / "release.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("README.md", "setup.cfg", "CITATION.cff"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def test_the_citation_is_one() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= found.keys()
    assert found["version"] == __version__
    assert found["license"] == "Apache-2.0"


def test_one_address_is_written_wherever_it_belongs(
    release: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (tmp_path / "README.md").read_text()
    for url in ("https://example.org/one/lla", "https://example.org/two/lla/"):
        monkeypatch.setattr(sys, "argv", ["release.py", "homepage", url])
        (tmp_path / "README.md").write_text(before)
        release.set_homepage()
    readme = (tmp_path / "README.md").read_text()
    assert release.relative_links(readme) == []
    assert len(release.LINK.findall(readme)) == len(release.LINK.findall(before))
    assert "](https://example.org/two/lla/blob/main/docs/cost.md)" in readme
    assert "](https://example.org/two/lla/raw/main/docs/images/" in readme
    for name in ("setup.cfg", "CITATION.cff"):
        text = (tmp_path / name).read_text()
        assert "/one/" not in text
        assert len(re.findall(r"https://example.org/two/lla$", text.replace('"', ""), re.M)) == 1
    assert yaml.safe_load((tmp_path / "CITATION.cff").read_text())["repository-code"]
    monkeypatch.setattr(sys, "argv", ["release.py", "homepage", "somewhere"])
    with pytest.raises(AssertionError, match="no address of a repository"):
        release.set_homepage()

"""What every test needs: float64 on request, one seed, no display, the real data's folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Send the tests of a file to one process (``--dist loadfile``)."""
    if config.getvalue("dist") != "loadfile":
        return None
    from .scheduling import ByFile

    return ByFile(config, log)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def data_folder() -> Path:
    """The folder with real data sets; tests that need it skip where it is absent."""
    folder = os.environ.get("LLA_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("LLA_DATA names no folder with mnist/ and pretrained/ in it")
    return Path(folder)


@pytest.fixture
def among_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand where "../../x" and "a/b" are files."""
    (tmp_path / "1" / "2" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "1" / "2")

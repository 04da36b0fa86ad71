"""A notebook, executed: results and figures show themselves as the last line of a cell."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

SETUP = """
import torch
from lla_callbacks import HessianMonitor, compare, loss_line, loss_plane, measure_hessian

torch.manual_seed(0)
net, batches = torch.nn.Linear(3, 1), [torch.randn(8, 3)]

def loss(module, batch):
    return module(batch).square().mean()

report = measure_hessian(net, batches, loss=loss)
line = loss_line(net, batches, loss=loss, alphas=[-1.0, 0, 1])
plane = loss_plane(net, batches, loss=loss, alphas=[-1.0, 0, 1], betas=[-1.0, 0, 1])
"""
CELLS = {
    "report": "report", "line": "line", "plane": "plane", "figure": "report.figure()",
    "plot": "report.plot()[0]", "surface": "plane.surface()", "compared": "compare(report, report)",
    "layers": "report.layer_figure()",
}  # fmt: skip


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    nbformat = pytest.importorskip("nbformat")
    cells = [nbformat.v4.new_code_cell(source) for source in (SETUP, *CELLS.values())]
    notebook = nbformat.v4.new_notebook(cells=cells)
    folder: Path = tmp_path_factory.mktemp("notebook")
    client = nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    outputs = [cell.outputs for cell in notebook.cells[1:]]
    assert [len(found) for found in outputs] == [1] * len(CELLS)
    return {name: found[0].data for name, found in zip(CELLS, outputs, strict=True)}


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_shows_a_picture(name: str, shown: dict[str, Any]) -> None:
    png = base64.b64decode(shown[name]["image/png"])
    assert png.startswith(b"\x89PNG")
    assert len(png) > 5000


def test_a_result_brings_its_summary(shown: dict[str, Any]) -> None:
    html = shown["report"]["text/html"]
    assert "data:image/png;base64," in html
    assert "largest eigenvalue" in html
    assert "LossPlane of" in shown["plane"]["text/html"]

"""Monitors of a part of the parameters, with eigenvectors; what they say of themselves; tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gan
import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lla_callbacks import HessianMonitor, HessianReport, LossLandscapeMonitor
from lla_callbacks.callbacks.compat import MisconfigurationException


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return F.cross_entropy(self.head(self.body(x).tanh()), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(*monitors: Any, folder: Path | None = None, steps: int = 3) -> Net:
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(24, 3), torch.randint(0, 2, (24,)))
    net = Net()
    trainer = Trainer(
        max_steps=steps, callbacks=list(monitors), logger=folder is not None, barebones=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, accelerator="cpu", log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(net, DataLoader(data, batch_size=8))
    return net


SMALL: dict[str, Any] = {"num_steps": 4, "num_probes": 2, "num_samples": 16, "figures": False}


def test_a_monitor_measures_its_part(tmp_path: Path) -> None:
    head = HessianMonitor(
        every_n_train_steps=1, parameters="head.*", num_eigenvectors=2, name="head", **SMALL
    )
    weights = HessianMonitor(
        every_n_train_steps=2, parameters=lambda name, p: p.ndim > 1, name="weights", **SMALL
    )
    slices = LossLandscapeMonitor(
        every_n_train_steps=2, parameters=["head"], planes=["trajectory"], lines=["update", "top1"],
        plane_points=3, line_points=3, num_samples=16, figures=False,
    )  # fmt: skip
    net = fit(head, weights, slices, folder=tmp_path)
    watched = fit()
    for mine, plain in zip(net.parameters(), watched.parameters(), strict=True):
        assert torch.equal(mine, plain)
        assert mine.requires_grad
    assert head.report is not None
    assert head.report.num_params == 10
    assert list(head.report.layers) == ["head"]
    assert weights.report is not None
    assert weights.report.num_params == 20
    # The last one has its vectors, its file too, the history their eigenvalues.
    assert head.report.eigenvectors is not None
    assert list(head.report.eigenvectors[0]) == ["head.weight", "head.bias"]
    kept = head.history[-1][1].eigenvectors
    assert kept is not None
    assert torch.equal(kept.values, head.report.eigenvectors.values)
    assert kept.vectors.numel() == 0
    file = next(tmp_path.glob("**/head/step_00000003.npz"))
    stored = HessianReport.load(file).eigenvectors
    assert stored is not None
    assert torch.equal(stored.vectors, head.report.eigenvectors.vectors)
    assert slices.report is not None
    assert slices.report.missing == {}
    assert set(slices.report.lines) == {"update", "top1"}
    assert slices.report.planes["trajectory"].path is not None


@pytest.mark.parametrize("kind", [HessianMonitor, LossLandscapeMonitor])
def test_a_pattern_that_matches_nothing_ends_the_fit_before_it_begins(kind: Any) -> None:
    with pytest.raises(
        MisconfigurationException,
        match=r"parameters contains 'tail\.\*', which matches no trained parameter; give patterns "
        r"of names among body\.weight, body\.bias, head\.weight, head\.bias",
    ):
        fit(kind(parameters="tail.*"))


def test_a_gans_players_are_measured_by_themselves(tmp_path: Path) -> None:
    found = gan.main(["--steps", "4", "--out", str(tmp_path)])
    sizes = {
        name: sum(p.numel() for p in getattr(found["gan"], name).parameters())
        for name in gan.PLAYERS
    }
    for name, size in sizes.items():
        assert found["reports"][name].num_params == size
        monitor = found["monitors"][name]
        assert monitor.report.num_params == size
        assert len(monitor.history) > 2
    assert (tmp_path / "spectra.png").exists()
    assert (tmp_path / "runs.png").exists()


def test_a_history_is_a_table_of_the_run() -> None:
    pytest.importorskip("pandas")
    monitor = HessianMonitor(every_n_train_steps=1, **SMALL)
    fit(monitor, steps=4)
    table = monitor.to_dataframe()
    assert table.index.tolist() == [step for step, _ in monitor.history]
    assert table["trace"].tolist() == [m.trace for _, m in monitor.history]
    with pytest.raises(ValueError, match="quantity is 'x'; give one of hessian"):
        monitor.to_dataframe("x")


def loss(module: Any, batch: Any) -> Any:
    return module.training_step(batch, 0)


@pytest.mark.parametrize(
    ("monitor", "words"),
    [
        (HessianMonitor(), "<HessianMonitor 'hessian': about ten times a run within 5% of training "
                           "time for all monitors together; on the first training samples, 256 at "
                           "most, by training_step, mode 'batch'; none so far>"),
        (HessianMonitor(every_n_train_steps=100, track_every_n_train_steps=10, num_samples=64,
                        loss=loss, parameters=["a.*"], mode="eval"),
         "at the start, every 100 steps, lightly every 10 steps and at the end; on the 64 first "
         "training samples by loss=loss, mode 'eval'; of the parameters ('a.*',); none so far>"),
        (LossLandscapeMonitor(every_n_epochs=1, max_overhead=0.1, dataloader=[torch.ones(2)]),
         "<LossLandscapeMonitor 'landscape': at the start, every epoch and at the end, within 10%; "
         "on the samples of its dataloader, 256 at most, by training_step"),
    ],
)  # fmt: skip
def test_a_monitor_says_what_it_does(monitor: Any, words: str) -> None:
    assert words in repr(monitor)


def test_a_monitor_says_what_it_found() -> None:
    monitor = HessianMonitor(every_n_train_steps=2, **SMALL)
    fit(monitor, steps=2)
    assert repr(monitor).endswith("2 measured so far, last at step 2>")

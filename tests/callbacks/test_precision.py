"""Trainers of every precision: curvature in float32, training bitwise as without a monitor."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lla_callbacks import HessianMonitor, LossLandscapeMonitor, measure_hessian

from .modules import differences


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))

    def training_step(self, batch, batch_idx):
        # The default dtype of a true precision is what a new tensor gets.
        return cross_entropy(self.net(batch[0]) * torch.ones(()), batch[1])

    def train_dataloader(self):
        torch.manual_seed(1)
        return DataLoader(TensorDataset(torch.randn(32, 4), torch.randint(3, (32,))), batch_size=16)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(tmp_path, *watchers, **settings):
    pl.seed_everything(1, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        callbacks=list(watchers),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **settings,
    )
    module = Net()
    trainer.fit(module)
    return {**module.state_dict(), "random": torch.get_rng_state()}, module


CASES = {
    "32-true": ("float32", "float32"),
    "bf16-mixed": ("float32", "bfloat16 autocast"),
    "bf16-true": ("float32", "bfloat16"),
    "64-true": ("float64", "float64"),
    "16-true": ("float32", "float16"),
}


@pytest.mark.parametrize("precision", CASES)
@pytest.mark.filterwarnings("ignore:.*")
def test_curvature_is_in_float32_unless_asked_otherwise(tmp_path, precision):
    monitors = [
        HessianMonitor(every_n_epochs=1, num_steps=4, num_probes=4),
        HessianMonitor(
            every_n_epochs=1, num_steps=4, num_probes=4, precision="training", name="as_trained"
        ),
        LossLandscapeMonitor(every_n_epochs=1, plane_points=3, line_points=3),
    ]
    without, _ = fit(tmp_path, precision=precision)
    with_monitors, module = fit(tmp_path, *monitors, precision=precision)
    assert differences(without, with_monitors) == []
    default, as_trained = (m.report for m in monitors[:2])
    assert (default.precision, as_trained.precision) == CASES[precision]
    assert len(monitors[2].history) == 3
    # What the default measures is what a float32 (or wider) copy of the weights has.
    wide = torch.float64 if precision == "64-true" else torch.float32
    twin = Net().to(wide)
    twin.load_state_dict({k: v.to(wide) for k, v in module.state_dict().items()})
    dtype = {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision, wide)
    batches = [(x.to(dtype).to(wide), y) for x, y in twin.train_dataloader()]

    def loss(module, batch):
        return cross_entropy(module.net(batch[0]), batch[1])

    report = measure_hessian(twin, batches, loss=loss, num_steps=4, num_probes=4)
    assert default.trace == pytest.approx(report.trace, rel=1e-5)
    assert float(default.lambda_max) == pytest.approx(float(report.lambda_max), rel=1e-5)
    assert as_trained.trace == pytest.approx(report.trace, rel=0.3, abs=3 * report.trace_sem)


def test_sixteen_bit_mixed_is_measured_in_float32(tmp_path):
    """float16 autocast needs a GPU's scaler; the plugin is built by hand on the CPU."""
    watcher = HessianMonitor(every_n_epochs=1, num_steps=4, num_probes=4)

    def train(*watchers):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        return fit(tmp_path, *watchers, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])[0]

    assert differences(train(), train(watcher)) == []
    assert watcher.report.precision == "float32"
    assert len(watcher.history) == 3

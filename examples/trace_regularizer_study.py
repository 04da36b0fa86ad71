"""Does a penalty on the Hessian's trace do what is claimed for it?

    python examples/trace_regularizer_study.py                 # scikit-learn's digits
    python examples/trace_regularizer_study.py --data FOLDER   # Fashion-MNIST

Trains a small network without and with the penalty, on all and on the middle layers, with
several strengths, and with SAM at equivalent radii; prints a table with 95 % intervals over
seeds. Claims: Sankar et al., AAAI 2021 (docs/regularizer.md has the answers).
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from image_data import load_images
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lla_callbacks import HessianMonitor, HessianTraceRegularizer, measure_hessian

# Two-sided 95 % quantile of Student's t, by seeds.
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 10: 2.262}
COLUMNS = ["trace", "lambda_max", "norm", "trace x norm^2", "train loss", "test loss", "test acc"]
PAIRED = ["change of log10 trace", "of test loss", "of test acc"]


def mlp() -> nn.Sequential:
    """Four linear layers for 8x8 images."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in (64, 128, 128):
        layers += [nn.Linear(width, 128), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 10))


def conv_net() -> nn.Sequential:
    """Four convolutions with batch norm and a linear layer for 14x14 images."""
    layers: list[nn.Module] = []
    for a, b, stride in [(1, 8, 1), (8, 16, 2), (16, 16, 1), (16, 32, 2)]:
        layers += [nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


class Classifier(pl.LightningModule):
    """Cross entropy; SGD with momentum and a cosine schedule, no weight decay."""

    def __init__(self, net: nn.Module, lr: float, steps: int) -> None:
        super().__init__()
        self.net, self.lr, self.steps = net, lr, steps

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class SAM(Classifier):
    """The same, with the gradient at ``w + rho g / |g|`` (Foret et al. 2021)."""

    def __init__(self, net: nn.Module, lr: float, steps: int, rho: float) -> None:
        super().__init__(net, lr, steps)
        self.rho = rho
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        parameters = list(self.net.parameters())
        kept = [p.detach().clone() for p in parameters]
        gradients = torch.autograd.grad(self.loss(batch), parameters)
        scale = self.rho / (torch.stack([g.norm() for g in gradients]).norm() + 1e-12)
        with torch.no_grad():
            torch._foreach_add_(parameters, gradients, alpha=float(scale))
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        with torch.no_grad():
            for p, original in zip(parameters, kept, strict=True):
                p.copy_(original)
        optimizer.step()
        self.lr_schedulers().step()


class Study:
    """One data set, one network, one way to train."""

    def __init__(self, data: Path | None, seeds: int) -> None:
        self.seeds = seeds
        train, test = load_images(data)
        if data is None:
            self.make, self.batch, self.epochs, self.lr, size = mlp, 50, 80, 0.05, 500
        else:
            self.make, self.batch, self.epochs, self.lr, size = conv_net, 50, 10, 0.05, 2000
        self.train, self.test = self._shrunk(train, size), self._shrunk(test, 2000)
        self.steps = self.epochs * (size // self.batch)

    @staticmethod
    def _shrunk(images: TensorDataset, size: int) -> TensorDataset:
        x, y = images.tensors[0][:size], images.tensors[1][:size]
        return TensorDataset(F.avg_pool2d(x, 2) if x.shape[-1] > 8 else x, y)

    def run(self, seed: int, rho: float = 0.0, monitor: HessianMonitor | None = None, **penalty):
        """Train once and return the numbers of a row."""
        pl.seed_everything(seed, verbose=False)
        net = self.make()
        module = SAM(net, self.lr, self.steps, rho) if rho else Classifier(net, self.lr, self.steps)
        callbacks = [monitor] if monitor else []
        if penalty:
            callbacks.append(HessianTraceRegularizer(**penalty, seed=seed))
        trainer = pl.Trainer(
            max_epochs=self.epochs, accelerator="cpu", logger=False, callbacks=callbacks,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(self.train, self.batch, shuffle=True))
        x, y = self.train.tensors
        report = measure_hessian(
            module, [(x[:256], y[:256])], loss=lambda m, b: m.loss(b), num_steps=10, num_probes=10
        )
        norm = math.sqrt(sum(float(p.detach().square().sum()) for p in net.parameters()))
        net.eval()
        with torch.no_grad():
            train, test = (d.tensors for d in (self.train, self.test))
            logits = net(test[0])
            losses = [float(F.cross_entropy(net(a), b)) for a, b in (train, test)]
            accuracy = 100 * float((logits.argmax(1) == test[1]).float().mean())
        values = [report.trace, float(report.lambda_max), norm, report.trace * norm**2]
        return [*values, *losses, accuracy]

    def row(self, name: str, plain: list[list[float]], **settings) -> None:
        """Train with every seed and print means, and changes paired by seed."""
        show(name, [self.run(seed, **settings) for seed in range(self.seeds)], plain)


def show(name: str, rows: list[list[float]], plain: list[list[float]]) -> None:
    """Print one row of the table: means with 95 % intervals over seeds."""
    cells = [interval(column) for column in zip(*rows, strict=True)]
    pairs = list(zip(rows, plain, strict=True))
    changes = [[math.log10(max(a[0], 1e-9) / b[0]) for a, b in pairs]]
    changes += [[a[i] - b[i] for a, b in pairs] for i in (5, 6)]
    cells += [interval(change) for change in changes]
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def interval(values) -> str:
    """Return ``mean ± half-width`` of a 95 % interval."""
    mean, half = statistics.fmean(values), math.nan
    if len(values) > 1:
        half = STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.3g} ± {half:.2g}" if abs(mean) < 10 else f"{mean:.4g} ± {half:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST")
    parser.add_argument("--seeds", type=int, choices=sorted(STUDENT), default=5)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    study = Study(arguments.data, arguments.seeds)

    print(f"Trace over {study.steps} steps without a penalty, by seed:")
    plain = []
    for seed in range(study.seeds):
        monitor = HessianMonitor(
            every_n_train_steps=study.steps // 8, num_samples=250, num_steps=8, num_probes=8
        )
        plain.append(study.run(seed, monitor=monitor))
        print("  " + ", ".join(f"{s}: {r.trace:.3g}" for s, r in monitor.history), flush=True)

    header = [*COLUMNS, *PAIRED]
    print("\n| penalty | " + " | ".join(header) + " |\n" + "|---" * (len(header) + 1) + "|")
    show("none", plain, plain)
    # SAM's loss rises by rho^2 lambda_max / 2, the noise's by strength * tr H: equal at this rho.
    spread = statistics.fmean(row[0] / row[1] for row in plain)
    for strength in (1e-4, 1e-3):
        for layers in ("all", "middle"):
            study.row(f"{layers}, {strength:g}", plain, strength=strength, layers=layers)
        rho = math.sqrt(2 * strength * spread)
        study.row(f"SAM, rho {rho:.2g} ({strength:g})", plain, rho=rho)
    for name, settings in {
        "relative, 0.1": {"strength": 0.1, "relative": True},
        "every 10th, 1e-4": {"strength": 1e-4, "every_n_train_steps": 10},
        "gauss_newton, 1e-3": {"strength": 1e-3, "estimator": "gauss_newton"},
    }.items():
        study.row(name, plain, **settings)


if __name__ == "__main__":
    main()

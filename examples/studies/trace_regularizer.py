"""Does a penalty on the Hessian's trace do what is claimed for it?

    python examples/studies/trace_regularizer.py                 # scikit-learn's digits
    python examples/studies/trace_regularizer.py --data FOLDER   # Fashion-MNIST
    python examples/studies/trace_regularizer.py --quick

Trains a small network without and with the penalty, on all and on the middle layers, with
several strengths, and with SAM at equivalent radii. Claims: Sankar et al., AAAI 2021
(docs/regularizer.md has more). Thresholds, written before any run, changes paired by seed:

S3   The penalty (1e-3 on all layers) flattens: log10 of the trace, without over with.
S3m  So it does on the middle layers alone.
S3a  It helps test accuracy (points; smallest effect of interest 0.5), S3l: and test loss (0.01).
S3s  It helps more than SAM at the radius of equal strength: test accuracy.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytorch_lightning as pl
import torch
from study import Study
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from image_data import load_images  # isort: skip

from lla_callbacks import HessianMonitor, HessianTraceRegularizer, measure_hessian

SOURCE = "Sankar et al. 2021"
COLUMNS = ["trace", "lambda_max", "norm", "trace x norm^2", "train loss", "test loss", "test acc"]


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


class Task:
    """One data set, one network, one way to train."""

    def __init__(self, data: Path | None, quick: bool) -> None:
        train, test = load_images(data)
        if data is None:
            self.make, self.batch, self.epochs, self.lr, size = mlp, 50, 80, 0.05, 500
            self.epochs = 20 if quick else self.epochs
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


def judge(study: Study) -> None:
    plain, whole, middle = ({"penalty": n} for n in ("none", "all, 0.001", "middle, 0.001"))
    sam = next(r["penalty"] for r in study.rows if "(0.001)" in r["penalty"])
    for key, kind, words in (("S3", whole, "flattens"), ("S3m", middle, "... on middle layers")):
        study.claim(key, f"the penalty {words}", SOURCE, "trace, without over with",
                    study.paired("trace", plain, kind, log=True), ratio=True,
                    smallest=math.log(1.1))  # fmt: skip
    study.claim("S3a", "the penalty helps test accuracy", SOURCE, "points, with minus without",
                study.paired("test acc", whole, plain), smallest=0.5)  # fmt: skip
    study.claim("S3l", "the penalty helps test loss", SOURCE, "without minus with",
                study.paired("test loss", plain, whole), smallest=0.01)  # fmt: skip
    study.claim("S3s", "... and more than SAM of equal strength", SOURCE, "points, over SAM",
                study.paired("test acc", whole, {"penalty": sam}), smallest=0.5)  # fmt: skip


def main() -> None:
    study = Study("trace_regularizer", __doc__, seeds=(5, 2))
    task = Task(study.data, study.quick)

    def rows(name: str, **settings) -> None:
        for seed in study.seeds:
            values = dict(zip(COLUMNS, task.run(seed, **settings), strict=True))
            study.row(penalty=name, seed=seed, **values)

    figures = {}
    for seed in study.seeds:
        monitor = HessianMonitor(
            every_n_train_steps=task.steps // 8, num_samples=250, num_steps=8, num_probes=8
        )
        values = task.run(seed, monitor=monitor)
        study.row(penalty="none", seed=seed, **dict(zip(COLUMNS, values, strict=True)))
        print("  trace: " + ", ".join(f"{s}: {r.trace:.3g}" for s, r in monitor.history))
        figures = {"": monitor.report.figure(title="Without a penalty, at the end")}
    # SAM's loss rises by rho^2 lambda_max / 2, the noise's by strength * tr H: equal at this rho.
    ends = [r for r in study.rows if r["penalty"] == "none"]
    spread = statistics.fmean(r["trace"] / r["lambda_max"] for r in ends)
    for strength in (1e-3,) if study.quick else (1e-4, 1e-3):
        for layers in ("all", "middle"):
            rows(f"{layers}, {strength:g}", strength=strength, layers=layers)
        rho = math.sqrt(2 * strength * spread)
        rows(f"SAM, rho {rho:.2g} ({strength:g})", rho=rho)
    if not study.quick:
        rows("relative, 0.1", strength=0.1, relative=True)
        rows("every 10th, 1e-4", strength=1e-4, every_n_train_steps=10)
        rows("gauss_newton, 1e-3", strength=1e-3, estimator="gauss_newton")
    judge(study)
    study.notes = [f"{task.steps:,} steps; trace and lambda_max on 256 training samples."]
    study.finish(["penalty", "seed", *COLUMNS], figures)


if __name__ == "__main__":
    main()

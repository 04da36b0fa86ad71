"""Does one gradient with noise do what two do, and what SAM does?

    python examples/studies/trace_noise.py                 # scikit-learn's digits
    python examples/studies/trace_noise.py --data FOLDER   # Fashion-MNIST
    python examples/studies/trace_noise.py --quick

The penalty on the Hessian's trace by one displaced gradient a step (estimator="noise"), by two
(estimator="perturbation") and SAM at the radius of equal strength, for an MLP and a conv net with
batch norm, with SGD and Adam. Rules and margins, written before any run. Effects are paired by
seed and averaged over the four settings first, so that seeds are the unit; noise is as good where
the whole 95 % interval is within the margin, worse where it is beyond as a whole.

N1   Noise flattens as much: its trace over that of the two-sided form; margin 1.25.
N2   ... and its lambda_max; margin 1.25.
N3   ... at no cost in test loss; margin 0.02.
N4   ... nor in test accuracy; margin 0.5 points.
N5   Its trace against no penalty (S3's rule: clear of 1, four of five seeds).
N6   It helps test loss more than SAM of equal strength does; smallest effect of interest 0.01.

It becomes the default if N1, N3 and N4 are confirmed on both data sets and its steps are at least
1.5 times as fast.
"""

from __future__ import annotations

import math
import statistics
import time

import pytorch_lightning as pl
import torch
from study import Study
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from trace_regularizer import SAM, Classifier

from image_data import load_images  # isort: skip

from lla_callbacks import HessianTraceRegularizer, measure_hessian
from lla_callbacks.minima.statistics import mean_interval

STRENGTH = 1e-3
COLUMNS = ["trace", "lambda_max", "norm", "train loss", "test loss", "test acc"]
ARMS = {
    "none": {},
    "noise": {"estimator": "noise"},
    "two-sided": {"estimator": "perturbation"},
    "SAM": None,
}


def mlp(side: int) -> nn.Sequential:
    """Four linear layers."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in (side * side, 128, 128):
        layers += [nn.Linear(width, 128), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 10))


def conv_net(side: int) -> nn.Sequential:
    """Three convolutions with batch norm and a linear layer."""
    layers: list[nn.Module] = []
    for a, b, stride in [(1, 8, 1), (8, 16, 2), (16, 32, 2)]:
        layers += [nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


NETS = {"mlp": mlp, "conv + bn": conv_net}
RATES = {"SGD": 0.05, "Adam": 2e-3}


def optimized(kind: type[Classifier], optimizer: str) -> type[Classifier]:
    """Return the class with another optimizer than SGD, where one is asked for."""

    def configure_optimizers(self):
        made = torch.optim.Adam(self.parameters(), self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(made, self.steps)
        return [made], [{"scheduler": schedule, "interval": "step"}]

    if optimizer == "SGD":
        return kind
    return type(kind.__name__, (kind,), {"configure_optimizers": configure_optimizers})


class Clock(pl.Callback):
    """Processor time of each batch, from the end of the one before."""

    def on_train_start(self, *_: object) -> None:
        self.times = [time.process_time()]

    def on_train_batch_end(self, *_: object) -> None:
        self.times.append(time.process_time())

    def rate(self) -> float:
        return 1 / statistics.median(
            b - a for a, b in zip(self.times, self.times[1:], strict=False)
        )


class Task:
    """One data set and one way to train."""

    def __init__(self, study: Study) -> None:
        train, test = load_images(study.data)
        size, self.batch = (500, 50) if study.data is None else (2000, 50)
        self.epochs = 80 if study.data is None else 20
        self.train, self.test = self._shrunk(train, size), self._shrunk(test, 2000)
        self.side = self.train.tensors[0].shape[-1]
        self.steps = self.epochs * (size // self.batch)

    @staticmethod
    def _shrunk(images: TensorDataset, size: int) -> TensorDataset:
        x, y = images.tensors[0][:size], images.tensors[1][:size]
        return TensorDataset(F.avg_pool2d(x, 2) if x.shape[-1] > 8 else x, y)

    def run(self, net: str, optimizer: str, seed: int, rho: float, penalty: dict) -> dict:
        """Train once and return the numbers of a row."""
        pl.seed_everything(seed, verbose=False)
        made, lr = NETS[net](self.side), RATES[optimizer]
        kind = optimized(SAM if rho else Classifier, optimizer)
        module = kind(made, lr, self.steps, *([rho] if rho else []))
        clock = Clock()
        callbacks: list[pl.Callback] = [clock]
        if penalty:
            callbacks.append(HessianTraceRegularizer(STRENGTH, **penalty, seed=seed))
        trainer = pl.Trainer(
            max_epochs=self.epochs, accelerator="cpu", logger=False, callbacks=callbacks,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            log_every_n_steps=0,
        )  # fmt: skip
        trainer.fit(module, DataLoader(self.train, self.batch, shuffle=True))
        x, y = self.train.tensors
        report = measure_hessian(
            module, [(x[:256], y[:256])], loss=lambda m, b: m.loss(b), num_steps=8, num_probes=8
        )
        norm = math.sqrt(sum(float(p.detach().square().sum()) for p in made.parameters()))
        made.eval()
        with torch.no_grad():
            logits = made(self.test.tensors[0])
            pairs = [(made(x), y), (logits, self.test.tensors[1])]
            losses = [float(F.cross_entropy(a, b)) for a, b in pairs]
            right = (logits.argmax(1) == self.test.tensors[1]).float().mean()
        values = [report.trace, float(report.lambda_max), norm, *losses, 100 * float(right)]
        return {**dict(zip(COLUMNS, values, strict=True)), "steps/s": clock.rate()}


def averaged(study: Study, name: str, one: str, other: str, log: bool = False) -> list[float]:
    """Return the paired effect of each seed, averaged over settings."""
    settings = sorted({(r["net"], r["optimizer"]) for r in study.rows})
    effects = [
        study.paired(
            name,
            {"net": net, "optimizer": optimizer, "arm": one},
            {"net": net, "optimizer": optimizer, "arm": other},
            log,
        )
        for net, optimizer in settings
    ]
    if len({len(e) for e in effects}) != 1:
        return []  # a trace that is not positive has no logarithm
    return [statistics.fmean(values) for values in zip(*effects, strict=True)]


def judge(study: Study) -> None:
    """Judge by the rules of the docstring."""
    for key, column, words, margin in (
        ("N1", "trace", "noise flattens as much as two gradients", math.log(1.25)),
        ("N2", "lambda_max", "... by lambda_max too", math.log(1.25)),
        ("N3", "test loss", "... at no cost in test loss", 0.02),
        ("N4", "test acc", "... nor in test accuracy", 0.5),
    ):
        ratio = column in ("trace", "lambda_max")
        order = ("two-sided", "noise") if column == "test acc" else ("noise", "two-sided")
        effects = averaged(study, column, *order, log=ratio)
        mean, low, high = mean_interval(effects) if effects else (math.nan,) * 3
        decides = len(effects) >= 3
        shown = [math.exp(v) if ratio else v for v in (mean, low, high)]
        measured = {True: "over two-sided", False: "less two-sided"}[ratio]
        measured = "two-sided less noise" if column == "test acc" else f"noise {measured}"
        study.claim_interval(
            key, words, "ours", f"{column}, {measured}", len(effects), *shown,
            confirmed=decides and high <= margin, refuted=decides and low > margin,
        )  # fmt: skip
    study.claim("N5", "noise flattens", "Orvieto et al. 2023", "trace, none over noise",
                averaged(study, "trace", "none", "noise", log=True), ratio=True)  # fmt: skip
    study.claim("N6", "noise helps test loss more than SAM", "ours", "test loss, SAM less noise",
                averaged(study, "test loss", "SAM", "noise"), smallest=0.01)  # fmt: skip


def main() -> None:
    study = Study("trace_noise", __doc__, seeds=(5, 2))
    task = Task(study)
    quick = [("mlp", "SGD")] if study.quick else None
    for net, optimizer in quick or [(n, o) for n in NETS for o in RATES]:
        rho = 0.0
        for arm, penalty in ARMS.items():
            setting = {"net": net, "optimizer": optimizer, "arm": arm}
            if arm == "SAM":
                # Its loss rises by rho^2 lambda_max / 2, the noise's by strength * tr H.
                ends = [r for r in study.rows if (r["net"], r["optimizer"]) == (net, optimizer)]
                ends = [r for r in ends if r["arm"] == "none"]
                spread = statistics.fmean(r["trace"] / r["lambda_max"] for r in ends)
                rho = math.sqrt(2 * STRENGTH * spread)
            for seed in study.seeds:
                study.row(
                    **setting, seed=seed, **task.run(net, optimizer, seed, rho, penalty or {})
                )
    judge(study)
    for arm in ARMS:
        print(f"{arm}: {statistics.fmean(study.column('steps/s', arm=arm)):.0f} steps a second")
    study.notes = [
        f"{task.steps:,} steps of {task.batch}, strength {STRENGTH:g}; trace and lambda_max on 256 "
        "training samples. Steps per second are in the .json file."
    ]
    study.finish(["net", "optimizer", "arm", "seed", *COLUMNS], {"": figure(study)})


def figure(study: Study):
    """Trace and test loss of each run."""
    from matplotlib.figure import Figure

    settings = sorted({(r["net"], r["optimizer"]) for r in study.rows})
    drawn = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, column in zip(drawn.subplots(1, 2), ("trace", "test loss"), strict=True):
        for place, arm in enumerate(ARMS):
            for i, (net, optimizer) in enumerate(settings):
                values = study.column(column, net=net, optimizer=optimizer, arm=arm)
                x = [i + 0.18 * (place - 1.5)] * len(values)
                label = arm if i == 0 else None
                axes.plot(x, values, "o", ms=4, color=f"C{place}", label=label)
        axes.set_xticks(range(len(settings)), [f"{n}\n{o}" for n, o in settings])
        axes.set_title(column)
        if column == "trace":
            axes.set_yscale("log")
            axes.legend(fontsize=8)
    return drawn


if __name__ == "__main__":
    main()

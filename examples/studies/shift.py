"""Do the criteria of the spectrum follow a shift of the data, and beyond what the loss says?

    python examples/studies/shift.py                # own networks, scikit-learn's digits
    python examples/studies/shift.py --data FOLDER  # LLA's LeNet and own ones, MNIST
    python examples/studies/shift.py --quick

One network on twelve sets: its own test images, and these noisy, turned, moved, blurred, dimmed,
inverted; the same number of samples each. FOLDER holds ``mnist/`` (idx files) and, for LLA's
published LeNet, ``pretrained/lla_lenet_example.pth``. Claims of Gabdullin (2024, 2025, "LLA").
Thresholds, written before any run; the unit is a network, its sets are what it is followed over:

L1  Criteria follow accuracy: the mean over networks of Spearman's rho of KH05 (L1k) and r_e (L1r)
    with accuracy is -0.6 or lower and its interval, by drawing networks, below 0. Refuted where
    the interval includes 0. L1t: the same of the trace; L1l: of the loss; L1c: of the confidence.
L2  They say more than the loss of the same samples does: partial rho given the loss, confirmed
    where its interval is below 0, refuted where it includes 0.
L3  Of networks of one architecture the one with lower KH05 generalizes better: Spearman's rho of
    KH05 and accuracy on the networks' own test images, confirmed below 0 with its interval.
L4  Ordinary training ends with a mainly positive spectrum (C_t of -0.6 or more) on training data:
    share of networks; confirmed at 95 %.
"""

from __future__ import annotations

import gzip
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from study import Study
from torch import Tensor, nn
from torch.nn import functional as F

from image_data import load_images  # isort: skip

from lla_callbacks import ShiftReport, measure_hessian, measure_shift
from lla_callbacks.minima.statistics import bootstrap, spearman

SOURCE = "Gabdullin 2024"
Batch = tuple[Tensor, Tensor]


class LeNet(nn.Module):
    """LeNet-5 with ReLU and max-pooling, the network of LLA's published example."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = F.max_pool2d(torch.relu(self.conv2(x)), 2).flatten(1)
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


def mlp(size: int) -> nn.Sequential:
    widths = [size, 64, 64]
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(64, 10))


def conv_net() -> nn.Sequential:
    """Two convolutions with batch norm, for 8x8 images."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def loss(module: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def idx(folder: Path, stem: str, count: int) -> Tensor:
    """Return the first images or labels of an MNIST file."""
    path = sorted(folder.glob(f"{stem}*"))[0]
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    shape = [int.from_bytes(raw[4 * i : 4 * i + 4], "big") for i in range(1, raw[3] + 1)]
    values = np.frombuffer(raw, np.uint8, offset=4 * (raw[3] + 1)).reshape(shape)[:count]
    if values.ndim == 1:
        return torch.from_numpy(values.astype(np.int64))
    return torch.from_numpy(values.astype(np.float32) / 255).unsqueeze(1)


def turned(x: Tensor, degrees: float, shift: float = 0.0, zoom: float = 1.0) -> Tensor:
    """Return images rotated, moved by a share of their width, and scaled."""
    a = math.radians(degrees)
    turn = torch.tensor([[math.cos(a), -math.sin(a), shift], [math.sin(a), math.cos(a), shift]])
    grid = F.affine_grid((turn / zoom).expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def shifts(test: Batch, train: Batch, seed: int) -> dict[str, list[Batch]]:
    """Return twelve sets of images, from the training set's own to wrecked ones."""
    x, y = test
    source = torch.Generator().manual_seed(seed)

    def noisy(sigma: float) -> Tensor:
        return (x + sigma * torch.randn(x.shape, generator=source)).clamp(0, 1)

    small = max(1, x.shape[-1] // 8)
    blurred = F.avg_pool2d(x, 2 * small + 1, 1, small, count_include_pad=False)
    sets = {
        "train": train[0], "test": x, "noise .2": noisy(0.2), "noise .4": noisy(0.4),
        "noise .8": noisy(0.8), "turned 15": turned(x, 15), "turned 30": turned(x, 30),
        "turned 60": turned(x, 60), "moved": turned(x, 0, 0.25), "blurred": blurred,
        "dimmed": 0.4 * x, "inverted": 1 - x,
    }  # fmt: skip
    return {name: [(images, train[1] if name == "train" else y)] for name, images in sets.items()}


def trained(make, seed: int, train: Batch, steps: int) -> nn.Module:
    torch.manual_seed(seed)
    module, (x, y) = make(), train
    optimizer = torch.optim.SGD(module.parameters(), 0.05, momentum=0.9)
    for _ in range(steps):
        chosen = torch.randint(0, len(x), (64,))
        optimizer.zero_grad()
        loss(module, (x[chosen], y[chosen])).backward()
        optimizer.step()
    return module.eval()


def followed(study: Study, name: str, seed: int, module: nn.Module, sets: dict, count: int) -> None:
    """Measure one network on every set."""
    depth = 30 if study.quick or study.data else 60
    found = measure_shift(module, sets, loss=loss, num_samples=count, num_steps=depth, num_probes=6)
    start = measure_hessian(
        module, [(x[:256], y[:256]) for x, y in sets["train"]], loss=loss, num_steps=40,
        num_probes=2, mode="eval",
    )  # fmt: skip
    for row in found.rows:
        keys = ("set", "num_wrong", "accuracy", "loss", "confidence", "trace", "lambda_max")
        study.row(network=name, seed=seed, **{k: row[k] for k in keys}, kh05=row["kh05"],
                  r_e=row["r_e"], c_t=start.criteria["c_t"])  # fmt: skip
    reports.append((name, found))


reports: list[tuple[str, ShiftReport]] = []


def judge(study: Study) -> None:
    def over_networks(key, text, name, given, threshold) -> None:
        rhos = torch.tensor([r.rank_correlation(name, given=given).value for _, r in reports])
        rhos = rhos[rhos.isfinite()].double()
        low, high = bootstrap(len(rhos), lambda i: rhos[i].mean(-1))
        value = float(rhos.mean()) if len(rhos) else math.nan
        # Confidence should rise with accuracy, everything else fall.
        sign = 1 if name == "confidence" else -1
        below = high < 0 if sign < 0 else low > 0
        wrong = low > 0 if sign < 0 else high < 0
        what = f"rank correlation over {len(reports[0][1].sets)} sets" + (
            ", given the loss" if given else ""
        )
        study.claim_interval(key, text, SOURCE if name in ("kh05", "r_e") else "a rival", what,
                             len(rhos), value, low, high,
                             confirmed=below and sign * value >= threshold,
                             refuted=low <= 0 <= high or wrong)  # fmt: skip

    for key, name in (("L1k", "kh05"), ("L1r", "r_e"), ("L1t", "trace"), ("L1l", "loss"),
                      ("L1c", "confidence")):  # fmt: skip
        over_networks(key, f"{name} follows accuracy over shifts", name, None, 0.6)
    for key, name in (("L2k", "kh05"), ("L2r", "r_e"), ("L2t", "trace")):
        over_networks(key, f"{name} says more than the loss does", name, "loss", 0.0)
    kinds = sorted({r["network"] for r in study.rows if r["set"] == "test"})
    for kind in kinds:
        rows = [r for r in study.rows if r["set"] == "test" and r["network"] == kind]
        if len(rows) < 4:
            continue
        table = torch.tensor([[r["kh05"] or math.nan, r["accuracy"]] for r in rows]).double()
        value = spearman(*table.T)
        low, high = bootstrap(
            len(rows), lambda i, t=table: torch.tensor([spearman(*t[k].T) for k in i]), draws=500
        )
        study.claim_interval(f"L3 ({kind})", "lower KH05 means a better generalizing network",
                             SOURCE, "rank correlation of KH05 and test accuracy over networks",
                             len(rows), value, low, high, confirmed=high < 0,
                             refuted=low > 0)  # fmt: skip
    ends = [r["c_t"] for r in study.rows if r["set"] == "test"]
    share = sum(c >= -0.6 for c in ends) / len(ends)
    study.claim_interval("L4", "ordinary training ends mainly positive (C_t of -0.6 or more)",
                         "Gabdullin 2025", "share of networks, on training data", len(ends), share,
                         math.nan, math.nan, confirmed=share >= 0.95 and len(ends) >= 10,
                         refuted=share < 0.5)  # fmt: skip


def main() -> None:
    study = Study("shift", __doc__, seeds=(5, 2))
    if study.data is None:
        train, test = (d.tensors for d in load_images(None))
        count = 300
        makes = {"mlp": (lambda: mlp(64), 400), "conv": (conv_net, 400)}
    else:
        mnist = study.data / "mnist"
        train = idx(mnist, "train-images", 6000), idx(mnist, "train-labels", 6000)
        test = idx(mnist, "t10k-images", 1000), idx(mnist, "t10k-labels", 1000)
        count = 500 if study.quick else 1000
        makes = {"lenet": (LeNet, 600), "mlp": (lambda: mlp(784), 600)}
        weights = study.data / "pretrained" / "lla_lenet_example.pth"
        if weights.exists():
            net = LeNet()
            net.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
            followed(study, "LLA's LeNet", 0, net.eval(), shifts(test, train, 0), count)
    part = tuple(t[:count] for t in train)
    if study.quick:
        makes = dict(list(makes.items())[:1]) if study.data else makes
    for name, (make, steps) in makes.items():
        # A LeNet takes ten times as long as all else together.
        for seed in list(study.seeds)[: 3 if make is LeNet else None]:
            module = trained(make, seed, train, steps)
            followed(study, name, seed, module, shifts(test, part, seed), count)
    judge(study)
    few = sorted({r["set"] for r in study.rows if r["num_wrong"] < 20})
    depth = reports[0][1].num_steps
    study.notes = [
        f"Lanczos depth {depth}, {count} samples a set, running statistics. Sets in which some "
        "network has fewer than 20 wrong samples, so that KH05 and r_e are chance there: "
        f"{', '.join(few) or 'none'}."
    ]
    columns = ["network", "seed", "set", "num_wrong", "accuracy", "loss", "confidence", "trace",
               "lambda_max", "kh05", "r_e", "c_t"]  # fmt: skip
    name, first = reports[0]
    study.finish(columns, {"": first.figure(title=f"{name}: criteria over shifts of the data")})


if __name__ == "__main__":
    main()

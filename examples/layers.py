"""Look at a network layer by layer while it learns: which layers curve, which are like the whole?

    python examples/layers.py                        # both networks, 5 seeds, about 5 minutes
    python examples/layers.py --seeds 1 --figures .  # one run of each, with figures

Prints, over seeds, how every layer's trace moved (does it fall?) and how far each layer's
normalized spectrum is from the whole network's (are the middle layers the nearest?), beside
the measure that Sankar et al. (AAAI 2021) computed.
"""

from __future__ import annotations

import argparse
import math
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import torch
from image_data import load_images
from torch import Tensor, nn
from torch.nn import functional as F

from lla_callbacks import HessianReport, measure_hessian
from lla_callbacks.hessian.layer_figures import layer_history_figure

STEPS = [0, 10, 40, 160, 320, 640, 1280]
# Half-width of a 95 % interval in standard errors, for 2, 3, ... seeds.
STUDENT = [12.7, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]


def mlp() -> nn.Sequential:
    """Eight dense layers; the six between the first and the last have one size."""
    rows = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise([64] + [32] * 7)]
    named = {f"dense{i}": row for i, row in enumerate([*rows, nn.Linear(32, 10)], 1)}
    return nn.Sequential(OrderedDict(flat=nn.Flatten(), **named))


def conv() -> nn.Sequential:
    """Five convolutions with batch norm, all but the first of one size, and a linear head."""
    rows = [
        nn.Sequential(nn.Conv2d(a, 16, 3, stride, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        for a, stride in [(1, 1), (16, 2), (16, 1), (16, 2), (16, 1)]
    ]
    named = {f"conv{i}": row for i, row in enumerate(rows, 1)}
    head = {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "head": nn.Linear(16, 10)}
    return nn.Sequential(OrderedDict(**named, **head))


def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def train(module: nn.Module, seed: int) -> list[tuple[int, HessianReport]]:
    """Train on the digits and measure 256 of them at every step of STEPS."""
    x, y = load_images(None)[0].tensors
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    settings = {"num_steps": 16, "num_layer_steps": 16, "num_runs": 2, "num_probes": 12}
    history = []
    for step in range(STEPS[-1] + 1):
        if step in STEPS:
            held = [(x[:256], y[:256])]
            found = measure_hessian(module, held, loss=loss, layers="blocks", seed=seed, **settings)
            history.append((step, found))
        chosen = torch.randint(0, len(x), (64,))
        optimizer.zero_grad()
        loss(module, (x[chosen], y[chosen])).backward()
        optimizer.step()
    return history


def mean(values: list[float]) -> str:
    """Return the mean over seeds and the half-width of its 95 % interval."""
    sample = torch.tensor(values, dtype=torch.float64)
    if len(values) < 2:
        return f"{float(sample):.3g}"
    half = STUDENT[min(len(values), 10) - 2] * float(sample.std()) / math.sqrt(len(values))
    return f"{float(sample.mean()):.3g} +- {half:.2g}"


def tell(runs: list[list[tuple[int, HessianReport]]]) -> None:
    """Print what the runs of one network have in common."""
    names = list(runs[0][0][1].layers)
    titles = ["layer", "trace, start", "peak", "end", "distance, end", "published, end"]
    print("".join(f"  {title:18}" for title in titles))
    for name in names:
        traces = [[report.layers[name].trace for _, report in run] for run in runs]
        spectra = [run[-1][1].layers[name].spectrum for run in runs]
        columns = [[t[0] for t in traces], [max(t) for t in traces], [t[-1] for t in traces]]
        columns += [[s.distance for s in spectra], [s.published_distance for s in spectra]]
        print("".join(f"  {cell:18}" for cell in [name, *map(mean, columns)]))
    whole = [[report.trace for _, report in run] for run in runs]
    print(
        f"  Trace of the whole: peaks at steps {[STEPS[t.index(max(t))] for t in whole]}; ends "
        f"below its peak in {sum(t[-1] < max(t) for t in whole)} of {len(runs)} runs, below its "
        f"start in {sum(t[-1] < t[0] for t in whole)}."
    )
    middle = names[len(names) // 4 : -(len(names) // 4)]
    for index, step in enumerate(STEPS):
        said = []
        for field in ("distance", "published_distance"):
            layers = [run[index][1].layers for run in runs]
            near = [min(names, key=lambda n: getattr(m[n].spectrum, field)) for m in layers]
            inside = sum(name in middle for name in near)
            said.append(f"{' '.join(near)} ({inside} in the middle half)")
        print(f"  Nearest the whole at step {step:4}: {said[0]}; published: {said[1]}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--figures", type=Path, help="folder for the figures of the first seed")
    arguments = parser.parse_args()
    for make in (mlp, conv):
        runs = []
        for seed in range(arguments.seeds):
            torch.manual_seed(seed)
            runs.append(train(make(), seed))
        print(f"{make.__name__}, {arguments.seeds} seeds, mean +- 95 % interval:")
        tell(runs)
        if arguments.figures:
            last = runs[0][-1][1]
            layer_history_figure(runs[0]).savefig(arguments.figures / f"{make.__name__}_map.png")
            last.layer_density_figure().savefig(arguments.figures / f"{make.__name__}_density.png")
            last.layer_distance_figure().savefig(
                arguments.figures / f"{make.__name__}_distance.png"
            )


if __name__ == "__main__":
    main()

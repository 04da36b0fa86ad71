"""Layer by layer while a network learns: which layers curve, which are like the whole?

    python examples/studies/layers.py           # both networks, 5 seeds, about 5 minutes
    python examples/studies/layers.py --quick   # the dense one, 2 seeds

Prints, over seeds, how every layer's trace moved and how far each layer's normalized spectrum is
from the whole network's, beside the measure that Sankar et al. (AAAI 2021) computed. Thresholds,
written before any run, one effect a seed, for each network:

S1  The trace falls during training: log ratio of start over end. S1p: it falls from its peak.
S2  Middle layers are most like the whole: mean distance (1-Wasserstein, of normalized spectra) of
    the outer layers minus that of the middle half, at the end; smallest effect of interest 0.02.
    S2s: the same among layers of like size only.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from itertools import pairwise

import torch
from study import Study
from torch import Tensor, nn
from torch.nn import functional as F

from image_data import load_images  # isort: skip

from lla_callbacks import HessianReport, measure_hessian
from lla_callbacks.hessian.layer_figures import layer_history_figure
from lla_callbacks.minima.statistics import mean_interval

STEPS = [0, 10, 40, 160, 320, 640, 1280]
SOURCE = "Sankar et al. 2021"


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
    middle, low, _ = mean_interval(values)
    return f"{middle:.3g} +- {middle - low:.2g}" if math.isfinite(low) else f"{middle:.3g}"


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


def judge(study: Study, name: str, runs: list[list[tuple[int, HessianReport]]]) -> None:
    """Keep a row a layer and seed, and judge the claims for one network."""
    falls, from_peak, middles, alike = [], [], [], []
    for seed, run in zip(study.seeds, runs, strict=True):
        last, traces = run[-1][1], [report.trace for _, report in run]
        falls.append(math.log(traces[0] / traces[-1]) if min(traces[0], traces[-1]) > 0 else -9.0)
        from_peak.append(math.log(max(traces) / traces[-1]) if traces[-1] > 0 else 9.0)
        names = list(last.layers)
        near = {n: last.layers[n].spectrum.distance for n in names}
        for layer in names:
            study.rows.append({"network": name, "seed": seed, "layer": layer,
                               "trace at start": run[0][1].layers[layer].trace,
                               "trace at end": last.layers[layer].trace,
                               "distance at end": near[layer]})  # fmt: skip
        cut = len(names) // 4
        # All but the first and the last layer have one size.
        for inside, outside, kept in (
            (names[cut : len(names) - cut], names[:cut] + names[len(names) - cut :], middles),
            (names[cut : len(names) - cut], names[1:cut] + names[len(names) - cut : -1], alike),
        ):
            means = [sum(near[n] for n in part) / max(1, len(part)) for part in (outside, inside)]
            kept.append(means[0] - means[1] if outside else math.nan)
    study.claim(f"S1 ({name})", "the trace falls during training", SOURCE,
                "trace, start over end", falls, ratio=True)  # fmt: skip
    study.claim(f"S1p ({name})", "... it ends below its peak", SOURCE, "trace, peak over end",
                from_peak, ratio=True, smallest=math.log(1.1))  # fmt: skip
    study.claim(f"S2 ({name})", "middle layers are most like the whole", SOURCE,
                "distance to the whole, outer minus middle half", middles,
                smallest=0.02)  # fmt: skip
    study.claim(f"S2s ({name})", "... among layers of like size", SOURCE,
                "the same, without the first and the last layer", alike,
                smallest=0.02)  # fmt: skip


def main() -> None:
    study = Study("layers", __doc__, seeds=(5, 2))
    if study.quick:
        STEPS[:] = [0, 10, 40, 160, 320]
    figures = {}
    for make in (mlp,) if study.quick else (mlp, conv):
        runs = []
        for seed in study.seeds:
            torch.manual_seed(seed)
            runs.append(train(make(), seed))
        print(f"{make.__name__}, {len(runs)} seeds, mean +- 95 % interval:")
        tell(runs)
        judge(study, make.__name__, runs)
        last = runs[0][-1][1]
        figures |= {f"_{make.__name__}_map": layer_history_figure(runs[0]),
                    f"_{make.__name__}_density": last.layer_density_figure(),
                    f"_{make.__name__}_distance": last.layer_distance_figure()}  # fmt: skip
    study.notes = [f"{STEPS[-1]:,} steps of SGD with momentum; 256 held samples."]
    columns = ["network", "seed", "layer", "trace at start", "trace at end", "distance at end"]
    study.finish(columns, figures)


if __name__ == "__main__":
    main()

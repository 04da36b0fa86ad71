"""Bad minima on the Swiss roll: do they exist, are they minima, are their basins smaller?

    python examples/studies/poison.py           # 4 seeds, about ten minutes
    python examples/studies/poison.py --quick   # 2 seeds, shorter training

Each seed trains one network three times from the same start: on 100 points (*clean*), on these
and 100 more whose labels are reversed (*poisoned*), and on these and the same 100 with their true
labels (*control*). Measured at the end, and for clean and control also at the checkpoint whose
loss is nearest to that of the poisoned network (*matched*). Claims of Huang et al., "Understanding
Generalization through Visualization" (2020). Thresholds, written before any run:

H1  Minima exist that fit the training set and are at chance elsewhere. Effect: 0.6 minus the
    held-out accuracy of the poisoned network after a *clean* relaxation, where it must fit the
    training set to 0.99.
H2  Bad minima have smaller basins. Effect: log ratio of effective radii (rise 0.1), clean over
    poisoned, at the end and matched.
H2c The control: fitting more points does not by itself shrink the basin. Effect: log ratio of
    control over poisoned.
H2r The same after the relaxation, clean over poisoned.
H2s Bad minima are sharper (lambda_max), as it is usually shown: at the end; and matched.
H3  Among poisoned networks the radius falls as the held-out accuracy falls: Spearman's rho over
    factors, interval by drawing seeds; confirmed above 0.3 with an interval above 0.
H4  Volumes differ by 10,000 orders of magnitude and more: n log10 of the radius ratio, n stated.
H5  Bad minima lie near the path of training. Effect: log of the path's length over the distance
    from the checkpoint where poison began to the bad minimum that it led to.
H6  Where an ideal boundary would be sharp, training fails: two rings with a gap between them.
    Effect: accuracy on the held-out inner ring at the widest gap minus that at the narrowest.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from study import Study
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lla_callbacks import (
    BasinRadii,
    PoisonedLoss,
    basin_radii,
    map_of_minima,
    measure_hessian,
    relax,
)
from lla_callbacks.minima.statistics import bootstrap, spearman
from lla_callbacks.report.style import DOWN, INK, UP, finish, subplots

SOURCE = "Huang et al. 2020"
FACTOR = 0.4
NUM_TRAIN, NUM_TEST = 100, 1000
SCALE = 3.0
KEPT = 60

Batch = tuple[Tensor, Tensor]


def swiss_roll(count: int, source: torch.Generator) -> Batch:
    """Two arms of a spiral; noise as published, coordinates over SCALE."""
    angle = torch.rand(count, generator=source).sqrt() * 600 * 2 * math.pi / 360
    noise = 0.5 * torch.rand(2, count, generator=source)
    points = torch.stack([-1.5 * angle.cos() * angle, 1.5 * angle.sin() * angle]) + noise
    labels = torch.arange(count) % 2
    return ((1 - 2 * labels) * points).T.contiguous() / SCALE, labels


def mlp(width: int = 64, depth: int = 3) -> nn.Sequential:
    sizes = [2, *[width] * depth]
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 2))


class Classifier(pl.LightningModule):
    """Full-batch Adam with a cosine schedule."""

    def __init__(self, net: nn.Module, lr: float, steps: int) -> None:
        super().__init__()
        self.net, self.lr, self.steps = net, lr, steps

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Path(pl.Callback):
    """Keeps checkpoints along the way, at steps that grow like a square."""

    def __init__(self, steps: int) -> None:
        self.wanted = {round(steps * (k / KEPT) ** 2) for k in range(KEPT + 1)}
        self.states: dict[int, dict[str, Tensor]] = {}

    def _keep(self, trainer, module) -> None:
        if trainer.global_step in self.wanted:
            state = module.state_dict().items()
            self.states[trainer.global_step] = {k: v.clone() for k, v in state}

    def on_train_start(self, trainer, pl_module) -> None:
        self._keep(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self._keep(trainer, pl_module)


def train(seed: int, batch: Batch, steps: int, poison: PoisonedLoss | None) -> tuple:
    """Train from a seed's start and return the module and its path."""
    torch.manual_seed(seed)
    module, path = Classifier(mlp(), 5e-3, steps), Path(steps)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[path, *([poison] if poison else [])],
    )  # fmt: skip
    trainer.fit(module, DataLoader([batch] * steps, batch_size=None))
    return module, path


def accuracy(module: nn.Module, batch: Batch) -> float:
    with torch.no_grad():
        return float((module(batch[0]).argmax(1) == batch[1]).double().mean())


def clean_loss(module: nn.Module, batch: Batch) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(module(batch[0]), batch[1]))


def measured(
    module: nn.Module, sets: list[Batch], rays: int
) -> tuple[dict[str, float], BasinRadii]:
    """Return the numbers of a row, and the radii."""
    train_set, poison_set, test_set = sets
    basin = basin_radii(module, [train_set], num_rays=rays, rise=0.1)
    hessian = measure_hessian(module, [train_set], num_steps=30, num_probes=12)
    row = {
        "train": accuracy(module, train_set),
        "poison": accuracy(module, poison_set),
        "test": accuracy(module, test_set),
        "loss": clean_loss(module, train_set),
        "gradient": hessian.gradient_norm,
        "radius": basin.effective_radius,
        "lambda_max": float(hessian.lambda_max),
        "trace": hessian.trace,
    }
    return row, basin


def with_state(module: Classifier, state: dict[str, Tensor]) -> Classifier:
    other = Classifier(mlp(), module.lr, module.steps)
    other.load_state_dict(state)
    return other


def matched(module: Classifier, path: Path, batch: Batch, loss: float) -> Classifier:
    """Return the checkpoint whose loss is nearest, as a ratio."""
    candidates = [with_state(module, state) for state in path.states.values()]
    return min(candidates, key=lambda m: abs(math.log(clean_loss(m, batch) / loss)))


def weights(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([v.reshape(-1) for v in state.values()])


def rings(gap: float) -> tuple[Batch, Batch]:
    """Return two rings of points with a gap between them, and what is held out of the second.

    40 points on the first, 10 of the other class between them on a ring that is wider by the
    gap, 80 more far out; held out, 400 all around the second ring.
    """

    def ring(count: int, radius: float, shift: float = 0.0) -> Tensor:
        angle = (torch.arange(count) + shift) / count * 2 * math.pi
        return radius * torch.stack([angle.cos(), angle.sin()], 1)

    x = torch.cat([ring(40, 0.4), ring(10, 0.4 + gap, 0.125), ring(80, 0.95)])
    y = torch.cat([torch.zeros(40), torch.ones(90)]).long()
    held = ring(400, 0.4 + gap)
    return (x, y), (held, torch.ones(400).long())


def ring_rows(study: Study, gaps: list[float], steps: int) -> None:
    for gap in gaps:
        batch, held = rings(gap)
        for seed in study.seeds:
            torch.manual_seed(seed)
            net = mlp(100, 4)
            optimizer = torch.optim.Adam(net.parameters(), 1e-3)
            for _ in range(steps):
                optimizer.zero_grad()
                F.cross_entropy(net(batch[0]), batch[1]).backward()
                optimizer.step()
            study.row(arm=f"rings {gap:g}", seed=seed, at="end", gap=gap,
                      train=accuracy(net, batch), test=accuracy(net, held))  # fmt: skip


def study_arms(
    study: Study, steps: int, rays: int, factors: list[float], starts: list[float]
) -> dict:
    """Train and measure every arm; return what figures need."""
    kept: dict = {"nets": {}, "values": []}
    for seed in study.seeds:
        source = torch.Generator().manual_seed(100 + seed)
        sets = [swiss_roll(n, source) for n in (NUM_TRAIN, NUM_TRAIN, NUM_TEST)]
        arms: dict[str, PoisonedLoss | None] = {"clean": None}
        arms["poisoned"] = PoisonedLoss(FACTOR, [sets[1]])
        arms["control"] = PoisonedLoss(FACTOR, [sets[1]], labels="true")
        trained, basins = {}, {}
        for arm, poison in arms.items():
            trained[arm] = train(seed, sets[0], steps, poison)
            row, basins[arm] = measured(trained[arm][0], sets, rays)
            study.row(arm=arm, seed=seed, at="end", **row)
        bad = trained["poisoned"][0]
        level = clean_loss(bad, sets[0])
        for arm in ("clean", "control"):
            module = matched(*trained[arm], sets[0], level)
            study.row(arm=arm, seed=seed, at="matched", **measured(module, sets, rays)[0])
        row, _ = measured(bad, sets, rays)
        study.row(arm="poisoned", seed=seed, at="matched", **row)
        way = relax(bad, [sets[0]], held_out=[sets[2]], num_steps=min(1000, steps))
        relaxed = with_state(bad, dict(way.state_dict))
        row, _ = measured(relaxed, sets, rays)
        study.row(arm="poisoned", seed=seed, at="relaxed", moved=float(way.displacement[-1]), **row)
        for factor in factors:
            module, _ = train(seed, sets[0], steps, PoisonedLoss(factor, [sets[1]]))
            study.row(arm=f"factor {factor:g}", seed=seed, at="end", factor=factor,
                      **measured(module, sets, rays)[0])  # fmt: skip
        states = trained["clean"][1].states
        for start in starts:
            begin = max(s for s in states if s <= start * steps)
            late, _ = train(seed, sets[0], steps, PoisonedLoss(FACTOR, [sets[1]], start_step=begin))
            flat = [weights(s) for s in states.values()]
            length = float(sum((b - a).norm() for a, b in pairwise(flat)))
            distance = float((weights(late.state_dict()) - weights(states[begin])).norm())
            study.row(arm=f"from step {begin}", seed=seed, at="end", start=begin, path=length,
                      distance=distance, **measured(late, sets, rays)[0])  # fmt: skip
            kept["nets"].setdefault("poisoned later", []).append(late)
        for arm, (module, _) in trained.items():
            kept["nets"].setdefault(arm, []).append(module)
        if seed == study.seeds[0]:
            chosen = sorted(states)[::6]
            kept["nets"]["path"] = [with_state(bad, states[s]) for s in chosen]
            kept |= {"sets": sets, "basins": basins, "way": way,
                     "arms": {a: m for a, (m, _) in trained.items()}}  # fmt: skip
    return kept


def judge(study: Study, factors: list[float], gaps: list[float]) -> None:
    relaxed = {"arm": "poisoned", "at": "relaxed"}
    fits = study.column("train", **relaxed)
    effects = [0.6 - t if f >= 0.99 else math.nan
               for t, f in zip(study.column("test", **relaxed), fits, strict=True)]  # fmt: skip
    study.claim("H1", "there are minima that fit the training set and are at chance elsewhere",
                SOURCE, "0.6 - held-out accuracy after 1,000 clean steps", effects)  # fmt: skip
    ends = {a: {"arm": a, "at": "end"} for a in ("clean", "poisoned", "control")}
    same = {a: {"arm": a, "at": "matched"} for a in ends}
    for key, words, rows in (("H2", "at the end", ends), ("H2m", "at matched loss", same)):
        study.claim(key, f"bad minima have smaller basins ({words})", SOURCE,
                    "radius, clean over poisoned",
                    study.paired("radius", rows["clean"], rows["poisoned"], log=True),
                    smallest=math.log(1.2), ratio=True)  # fmt: skip
    study.claim("H2c", "... smaller than those of the control on the same extra points", "control",
                "radius, control over poisoned",
                study.paired("radius", ends["control"], ends["poisoned"], log=True),
                smallest=math.log(1.2), ratio=True)  # fmt: skip
    study.claim("H2f", "fitting more points (true labels) shrinks the basin", "control",
                "radius, clean over control",
                study.paired("radius", ends["clean"], ends["control"], log=True),
                smallest=math.log(1.2), ratio=True)  # fmt: skip
    study.claim("H2r", "... and still are after a clean relaxation", "ours",
                "radius, clean over relaxed poisoned",
                study.paired("radius", ends["clean"], relaxed, log=True),
                smallest=math.log(1.2), ratio=True)  # fmt: skip
    for key, words, rows in (("H2s", "at the end", ends), ("H2sm", "at matched loss", same)):
        study.claim(key, f"bad minima are sharper ({words})", SOURCE,
                    "lambda_max (batch mode), poisoned over clean",
                    study.paired("lambda_max", rows["poisoned"], rows["clean"], log=True),
                    smallest=math.log(1.2), ratio=True)  # fmt: skip
    if factors:
        chosen = [r for r in study.rows if r["arm"].startswith("factor")]
        chosen += [r for r in study.rows if (r["arm"], r["at"]) == ("poisoned", "end")]
        rhos = torch.tensor([
            spearman(*(torch.tensor([r[n] for r in chosen if r["seed"] == s]).double()
                       for n in ("test", "radius")))
            for s in study.seeds
        ])  # fmt: skip
        low, high = bootstrap(len(rhos), lambda i: rhos[i].mean(-1))
        value = float(rhos.mean())
        study.claim_interval("H3", "the worse a bad minimum generalizes, the smaller its basin",
                             SOURCE, f"rank correlation of radius and held-out accuracy over "
                             f"{1 + len(factors)} factors", len(rhos), value, low, high,
                             confirmed=value > 0.3 and low > 0,
                             refuted=low <= 0 <= high or high < 0)  # fmt: skip
    n = sum(p.numel() for name, p in mlp().named_parameters() if name.endswith("weight"))
    orders = study.paired("radius", ends["clean"], ends["poisoned"], log=True)
    study.claim("H4", "volumes differ by 10,000 orders of magnitude and more", SOURCE,
                f"n log10(radius ratio) - 10,000 at n = {n:,}",
                [n * e / math.log(10) - 1e4 for e in orders])  # fmt: skip
    near = [math.log(r["path"] / r["distance"]) for r in study.rows if "distance" in r]
    study.claim("H5", "bad minima lie near the path of training", SOURCE,
                "length of the clean path over distance from its checkpoint to the bad minimum",
                near, ratio=True)  # fmt: skip
    wide, narrow = ({"arm": f"rings {g:g}"} for g in (max(gaps), min(gaps)))
    study.claim("H6", "the narrower the ring between two classes, the less of it is found", SOURCE,
                f"held-out accuracy on the ring, gap {max(gaps):g} minus gap {min(gaps):g}",
                study.paired("test", wide, narrow), smallest=0.05)  # fmt: skip


def boundaries(kept: dict, title: str) -> Figure:
    """Return what each arm predicts over the plane, beside its radii."""
    figure, axes = subplots(1, 4, size=(12.4, 3.9), widths=[1, 1, 1, 1.15])
    reach = 18 / SCALE
    line = torch.linspace(-reach, reach, 240)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).reshape(-1, 2)
    x, y = (t.numpy() for t in kept["sets"][0])
    colors = {"clean": UP, "poisoned": DOWN, "control": "#2f855a"}
    for panel, (arm, module) in zip(axes, kept["arms"].items(), strict=False):
        with torch.no_grad():
            share = module(grid).softmax(1)[:, 1].reshape(240, 240).numpy()
        panel.contourf(line, line, share, levels=[0, 0.5, 1], colors=["#dbe7f5", "#fbe3d0"])
        for label, color, marker in ((0, UP, "o"), (1, DOWN, "s")):
            panel.scatter(
                *x[y == label].T, color=color, marker=marker, s=13, edgecolors="white", lw=0.4
            )
        scores = [accuracy(module, kept["sets"][k]) for k in (0, 2)]
        said = f"train {scores[0]:.2f}, held out {scores[1]:.2f}"
        panel.set_title(f"{arm}: {said}", loc="left", fontsize=8.5, color=INK)
        panel.set_aspect("equal")
        panel.set_xticks([])
        panel.set_yticks([])
    for arm, basin in kept["basins"].items():
        radii = np.sort(basin.radii.numpy())
        share = np.arange(1, len(radii) + 1) / len(radii)
        axes[3].step(radii, share, where="post", color=colors[arm], lw=1.8,
                     label=f"{arm}: {basin.effective_radius:.2g}")  # fmt: skip
    axes[3].set_xscale("log")
    axes[3].set_ylim(0, 1.02)
    axes[3].set_xlabel("radius  [filter norms]")
    axes[3].set_title("share of rays that have left the basin", loc="left", fontsize=8.5, color=INK)
    axes[3].legend(frameon=False, fontsize=8, labelcolor=INK, title="effective radius",
                   title_fontsize=8)  # fmt: skip
    facts = [f"{NUM_TRAIN} training points (drawn)", f"{NUM_TRAIN} of poison", "rise 0.1",
             f"factor {FACTOR:g}", "first seed"]  # fmt: skip
    finish(figure, title, facts, ["Shaded: the predicted class. Points: the training set."])
    return figure


def main() -> None:
    study = Study("poison", __doc__, seeds=(4, 2))
    steps, rays = (1500, 30) if study.quick else (4000, 60)
    factors = [] if study.quick else [0.2, 0.5]
    starts = [0.1] if study.quick else [0.02, 0.1]
    gaps = [0.01, 0.3] if study.quick else [0.001, 0.03, 0.3]
    kept = study_arms(study, steps, rays, factors, starts)
    ring_rows(study, gaps, 400 if study.quick else 1500)
    judge(study, factors, gaps)
    held = [kept["sets"][2]]
    nets = kept["nets"]
    scores = [accuracy(m, held[0]) for group in nets.values() for m in group]
    look = {"path": "path", "values": scores, "values_name": "held-out accuracy"}
    minima = map_of_minima(nets, held, **look)
    study.notes = [
        f"Map of {len(scores)} networks by predictions: trustworthiness "
        f"{minima.trustworthiness:.2f}, rank correlation {minima.rank_correlation:.2f}. *matched*: "
        "the checkpoint whose loss is nearest to the poisoned network's. *relaxed*: after 1,000 "
        "plain steps of Adam (1e-3) on the training set alone."
    ]
    figures = {
        "": boundaries(kept, "A bad minimum fits the same points, and its basin is smaller"),
        "_map": minima.figure(title="Minima of the Swiss roll, and one path of training"),
        "_relaxation": kept["way"].figure(title="A poisoned network under plain training"),
    }
    columns = ["arm", "seed", "at", "train", "poison", "test", "loss", "gradient", "radius",
               "lambda_max", "trace", "moved", "path", "distance"]  # fmt: skip
    study.finish(columns, figures)


if __name__ == "__main__":
    main()

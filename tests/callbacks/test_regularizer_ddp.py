"""Two real processes that train, regularized or poisoned, against loops by hand in float64."""

from functools import partial

import pytest
import torch

from tests.curves.curve_cases import train_by_hand as train_curve_by_hand

from .by_hand import (
    STRENGTH,
    Double,
    added,
    difference,
    exact,
    gradient_at,
    half_loader,
    noise,
    perturbation,
    train_by_hand,
)
from .ddp_worker import POISONED, RUNS
from .poison_by_hand import poison_batches, train_with_poison
from .two_processes import in_two

# One pair of processes for all of them.
GRADIENTS = {
    "static graph, exact": exact,
    "difference": difference,
    "noise": noise,
    "noise, static graph": noise,
    "noise, all": partial(noise, relative=True),
    "noise, manual": noise,
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """What both processes end with, run by run: rank to name to tensor."""
    cases = [*RUNS, "connection", *POISONED]
    found = in_two(tmp_path_factory.mktemp("ddp"), "tests.callbacks.ddp_worker", cases)
    assert found.codes == [0, 0], found.output
    return {case: found(case) for case in cases}


def limited(module, batches, step):
    """The whole batch decides how far the penalty is scaled down."""
    plain = [gradient_at(module, batch, 0.0, step) for batch in batches]
    total = [perturbation(module, batch, step, 1e-2) for batch in batches]
    plain, total = (added([0.5, 0.5], parts) for parts in (plain, total))
    penalty = added([1.0, -1.0], [total, plain])
    norms = [float(torch.cat([g.reshape(-1) for g in x]).norm()) for x in (penalty, plain)]
    return added([1.0, min(1.0, 0.05 * norms[1] / norms[0])], [plain, penalty])


def by_hand(name):
    """Train on both processes' batches in turn, together."""
    _, trainer, settings, penalty = RUNS[name]
    torch.manual_seed(3)
    module = Double(**{k: v for k, v in settings.items() if k != "manual"})
    batches = [b for pair in zip(half_loader(0), half_loader(1), strict=True) for b in pair]
    if name == "limit":
        optimizer = module.configure_optimizers()
        for step in range(4):
            found = limited(module, batches[2 * step : 2 * step + 2], step)
            for p, g in zip(module.parameters(), found, strict=True):
                p.grad = g
            optimizer.step()
        return module
    every = penalty.get("every_n_train_steps", 1)
    return train_by_hand(
        module,
        batches,
        gradient=GRADIENTS.get(name, perturbation),
        strength=lambda step: 0 if step % every else every * STRENGTH,
        together=2 * trainer.get("accumulate_grad_batches", 1),
        clip=trainer.get("gradient_clip_val"),
    )


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_the_loop_by_hand(weights, name):
    reference = dict(by_hand(name).named_parameters())
    torch.manual_seed(3)
    start = dict(
        Double(**{k: v for k, v in RUNS[name][2].items() if k != "manual"}).named_parameters()
    )
    for rank in range(2):
        found = weights[name][rank]
        assert found.keys() == reference.keys()
        for key, value in found.items():
            # Differences divide rounding by a squared step of about 4e-3.
            limit = 1e-9 if name == "difference" else 1e-12
            assert float((value - reference[key].detach()).abs().max()) < limit, key
    moved = max(float((weights[name][0][k] - p.detach()).abs().max()) for k, p in start.items())
    assert moved > 1e-2


def test_two_processes_train_the_curve_of_a_loop_by_hand(weights):
    ends = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        ends.append(Forward(Double(smooth=True)))
    batches = [b for pair in zip(half_loader(0), half_loader(1), strict=True) for b in pair]
    expected = train_curve_by_hand(
        *ends, [batches[i : i + 4] for i in range(0, len(batches), 4)],
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), kind="bezier", bends=2, scaled=True,
        clip=0.1,
    )  # fmt: skip
    for rank in range(2):
        for found, bend in zip(weights["connection"][rank], expected, strict=True):
            for name, value in found.items():
                assert float((value - bend[f"inner.{name}"]).abs().max()) < 1e-12


class Forward(torch.nn.Module):
    """`Double` as a function of its input."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner.net(x)


@pytest.mark.parametrize("name", POISONED)
def test_two_processes_share_out_the_poison(weights, name):
    """As one process with both processes' batches, and twice as many batches of poison."""
    _, trainer, settings = POISONED[name]
    torch.manual_seed(3)
    module = Double(**settings)
    batches = [b for pair in zip(half_loader(0), half_loader(1), strict=True) for b in pair]
    reference = train_with_poison(
        module,
        batches,
        poison_batches(),
        together=2 * trainer.get("accumulate_grad_batches", 1),
        clip=trainer.get("gradient_clip_val"),
    )
    for rank in range(2):
        for key, value in reference.named_parameters():
            found = weights[name][rank][key]
            assert float((found - value.detach()).abs().max()) < 1e-12, (rank, key)

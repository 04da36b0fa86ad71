"""Plain training of a copy, as a loop by hand has it, and nothing left behind."""

import math

import pytest
import torch
from torch import nn

from lla_callbacks import relax
from tests.callbacks.by_hand import Double

from .minima_cases import accuracy, data, loss, net

BATCHES = [data(), data(16, seed=8)]
HELD = [data(10, seed=9)]


def whole(module, batches):
    counts = [len(b[1]) for b in batches]
    with torch.no_grad():
        losses = [n * float(loss(module, b)) for n, b in zip(counts, batches, strict=True)]
        right = [n * accuracy(module, b) for n, b in zip(counts, batches, strict=True)]
    return sum(losses) / sum(counts), sum(right) / sum(counts)


def test_it_is_the_loop_by_hand():
    found = relax(net(), BATCHES, held_out=HELD, loss=loss, num_steps=7, lr=0.05)
    hand = net()
    start = torch.cat([p.detach().reshape(-1) for p in hand.parameters()])
    optimizer = torch.optim.Adam(hand.parameters(), lr=0.05)
    rows = []
    for step in range(8):
        optimizer.zero_grad()
        loss(hand, BATCHES[step % 2]).backward()
        now = torch.cat([p.detach().reshape(-1) for p in hand.parameters()])
        gradient = torch.cat([p.grad.reshape(-1) for p in hand.parameters()])
        moved = float((now - start).norm() / start.norm())
        rows.append([*whole(hand, BATCHES), *whole(hand, HELD), moved, float(gradient.norm())])
        optimizer.step()
    assert found.steps.tolist() == [float(k) for k in range(8)]
    columns = [found.loss, found.accuracy, found.held_loss, found.held_accuracy,
               found.displacement, found.gradient_norm]  # fmt: skip
    table = torch.stack(columns, 1)
    torch.testing.assert_close(table, torch.tensor(rows).double(), rtol=1e-6, atol=1e-12)
    assert (found.num_samples, found.num_held, found.num_params) == (40, 10, 32)
    assert "7 steps" in repr(found)
    # It took a step more by hand.
    ended = net()
    ended.load_state_dict(found.state_dict)
    assert whole(ended, BATCHES) == pytest.approx((rows[-1][0], rows[-1][1]))
    assert found.displacement[-1] > 0.05


def test_nothing_is_left_behind():
    """Weights, running statistics, random streams, modes and gradients, with dropout on."""
    module = net(norm=True)
    module[1].eval()
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    modes = [m.training for m in module.modules()]
    random = torch.get_rng_state()
    found = relax(module, BATCHES, loss=loss, num_steps=5, lr=0.1)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert [m.training for m in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(bool((p.grad == 1).all()) for p in module.parameters())
    assert torch.equal(found.loss, relax(module, BATCHES, loss=loss, num_steps=5, lr=0.1).loss)
    assert found.held_accuracy.isnan().all()


def test_weights_come_back_after_an_error():
    module = net()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    calls = []

    def failing(module, batch):
        calls.append(1)
        if len(calls) > 9:
            raise RuntimeError("no more")
        return loss(module, batch)

    with pytest.raises(RuntimeError, match="no more"):
        relax(module, BATCHES, loss=failing, num_steps=20, lr=0.1)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_a_lightning_module_needs_no_loss_and_regression_has_no_accuracy():
    torch.manual_seed(0)
    module = Double(smooth=True)
    found = relax(module, [data()], num_steps=2, predict=lambda m, b: (m.net(b[0]), b[1]))
    assert found.accuracy.isfinite().all()
    line = nn.Linear(3, 1).double()
    x = data()[0]

    def squares(module, batch):
        return (module(batch[0]) - batch[1]).square().mean()

    assert relax(line, [(x, x[:, :1])], loss=squares, num_steps=2).accuracy.isnan().all()


def test_points_spread_evenly_over_the_logarithm_of_steps():
    found = relax(net(), [data()], loss=loss, num_steps=120, lr=1e-3)
    assert 15 < len(found.steps) < 26
    assert found.steps[0] == 0
    assert found.steps[-1] == 120


def test_its_figure_and_file(tmp_path):
    found = relax(net(), BATCHES, held_out=HELD, loss=loss, num_steps=3)
    figure = found.figure()
    assert [len(axes.lines) for axes in figure.axes] == [2, 2, 1]
    assert "A minimum has none" in " ".join(figure.get_supxlabel().split())
    assert any(t.get_text().startswith("held-out accuracy ") for t in figure.texts)
    figure.savefig(tmp_path / "relax.png")
    assert found.save(tmp_path / "relax.npz").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"optimizer": "adam"}, r"give optimizer\(parameters\)"),
    ],
)
def test_settings_that_are_not_allowed(settings, words):
    with pytest.raises(ValueError, match=words):
        relax(net(), BATCHES, loss=loss, **settings)


def test_one_batch_is_no_list_of_batches_and_a_number_no_loss():
    with pytest.raises(ValueError, match=r"is one batch.*\[batch\]"):
        relax(net(), data(), loss=loss)
    with pytest.raises(ValueError, match=r"is one batch.*\[batch\]"):
        relax(net(), BATCHES, held_out=data(), loss=loss)
    with pytest.raises(TypeError, match="the loss returned float"):
        relax(net(), BATCHES, loss=lambda m, b: 0.5)

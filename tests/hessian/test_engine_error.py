"""What differences of gradients can say, and the gaps they leave, in results and pictures."""

import math

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import nn
from torch.nn.functional import cross_entropy

from lla_callbacks import MeasurementError, measure_hessian
from lla_callbacks.hessian.figures import history_figure
from lla_callbacks.hessian.scalars import hessian_scalars
from lla_callbacks.hessian.words import describe_change


def loss(module, batch):
    return cross_entropy(module(batch[0]), batch[1])


def problem(activation, dtype=torch.float32, steps=200):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(8, 48), activation(), nn.Linear(48, 48), activation(), nn.Linear(48, 3)
    ).to(dtype)
    x, y = torch.randn(256, 8, dtype=dtype), torch.randint(3, (256,))
    optimizer = torch.optim.Adam(net.parameters(), 0.005)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(net, (x, y)).backward()
        optimizer.step()
    return net, [(x, y)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU])
def test_smooth_networks_have_the_exact_report_within_its_errors(activation, dtype):
    net, batches = problem(activation, dtype)
    exact = measure_hessian(net, batches, loss=loss, engine="exact")
    found = measure_hessian(net, batches, loss=loss, engine="difference")
    assert found.engine == "difference"
    assert found.gaps == {}
    assert 0 < found.product_error < 0.05
    for name in ("lambda_max", "lambda_min"):
        one, other = getattr(exact, name), getattr(found, name)
        assert abs(one - other) <= one.residual + other.residual
    # The same probes: what differs is the engine's, which the standard error holds.
    assert abs(exact.trace - found.trace) < 3 * found.trace_sem
    assert found.criteria["kh05"] == pytest.approx(
        exact.criteria["kh05"], abs=3 * exact.criteria_errors["kh05"] + 1e-3
    )
    bound = 1e-6 if dtype == torch.float64 else 0.05
    assert found.trace == pytest.approx(exact.trace, rel=bound)


def test_kinks_leave_gaps_with_the_reason():
    net, batches = problem(nn.ReLU)
    found = measure_hessian(net, batches, loss=loss, engine="difference")
    assert {"trace", "layers", "density", "criteria"} <= set(found.gaps)
    assert "kinks" in found.gaps["trace"]
    assert math.isnan(found.trace)
    assert math.isnan(found.criteria["kh05"])
    assert found.nodes.numel() == found.eigenvalues.numel() == 0
    assert found.layers == {}
    # What remains is right: the loss, its gradient, and extremes only within the bound.
    exact = measure_hessian(net, batches, loss=loss)
    assert exact.engine == "exact"
    assert exact.gaps == {}
    assert found.loss == pytest.approx(exact.loss)
    for name in ("lambda_max", "lambda_min"):
        value = getattr(found, name)
        assert name in found.gaps or abs(value - getattr(exact, name)) <= value.residual
    tags = hessian_scalars(found)
    assert "hessian/trace" not in tags
    assert "hessian/loss" in tags


def test_gaps_can_be_drawn_told_and_saved(tmp_path):
    net, batches = problem(nn.ReLU)
    found = measure_hessian(net, batches, loss=loss, engine="difference")
    for figure in (found.figure(), history_figure([(0, found), (5, found)])):
        FigureCanvasAgg(figure).draw()
        said = " ".join(text.get_text() for axes in figure.axes for text in axes.texts)
        assert "No density" in said
    assert "no trace" in found.summary()
    assert "nan" not in found.summary().replace("no ", "")
    assert describe_change([(0, found), (5, found)]) == ""
    exact = measure_hessian(net, batches, loss=loss)
    FigureCanvasAgg(history_figure([(0, exact), (5, found), (9, exact)])).draw()
    with np.load(found.save(tmp_path / "gaps.npz")) as arrays:
        assert "trace" in arrays["gap_names"].tolist()
        assert str(arrays["engine"]) == "difference"


def test_a_padding_vector_that_is_a_weight_elsewhere_is_refused_by_differences():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(6, 4, padding_idx=0)
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(torch.tanh(self.embed(x).mean(1)))

    batches = [(torch.randint(6, (16, 3)), torch.randint(6, (16,)))]
    assert measure_hessian(Tied(), batches, loss=loss, num_steps=4, num_probes=4).engine == "exact"
    with pytest.raises(MeasurementError, match=r"padding vector.*Take engine='exact'"):
        measure_hessian(Tied(), batches, loss=loss, engine="difference")


def test_an_engine_that_does_not_exist_is_named():
    net, batches = problem(nn.Tanh, steps=0)
    with pytest.raises(ValueError, match=r"engine is 'fast'; give one of auto, exact, difference"):
        measure_hessian(net, batches, loss=loss, engine="fast")

"""Coefficients, exact ends, lengths, and the identities of the gradient, in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from lla_callbacks import Curve
from lla_callbacks.curves.curve import (
    coefficients,
    mean_square,
    step_lengths,
    straight_bends,
)
from lla_callbacks.curves.measure import even, statistics_of
from lla_callbacks.curves.training import MovingCurve

KINDS = ["bezier", "chain"]
GRID = even(61)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_coefficients_sum_to_one_and_are_exact_at_the_ends(kind: Any, count: int) -> None:
    for t in GRID.tolist():
        c = coefficients(kind, count, t)
        assert abs(sum(c) - 1) <= count * torch.finfo(torch.float64).eps
        assert min(c) >= 0
    assert coefficients(kind, count, 0.0) == [1.0] + [0.0] * (count - 1)
    assert coefficients(kind, count, 1.0) == [0.0] * (count - 1) + [1.0]


def test_one_bend_is_the_published_formula() -> None:
    t = 0.3
    assert coefficients("bezier", 3, t) == pytest.approx([0.49, 2 * 0.3 * 0.7, 0.09], abs=1e-15)
    # 2 (t w + (1/2 - t) a), and 2 ((t - 1/2) b + (1 - t) w) in the second half.
    assert coefficients("chain", 3, t) == pytest.approx([0.4, 0.6, 0.0], abs=1e-15)
    assert coefficients("chain", 3, 0.8) == pytest.approx([0.0, 0.4, 0.6], abs=1e-15)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bends", [1, 2, 3])
def test_mean_squares_are_those_of_quadrature(kind: Any, bends: int) -> None:
    t = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    rows = [coefficients(kind, bends + 2, s) for s in t.tolist()]
    c = torch.tensor(rows, dtype=torch.float64)
    found = [mean_square(kind, bends + 2, j) for j in range(1, bends + 1)]
    # The midpoint rule is off by h^2 / 24 times the second derivative, below 20.
    assert found == pytest.approx(c.square().mean(0)[1:-1].tolist(), abs=20 / 24 / 2000**2)


def points(bends: int, dtype: torch.dtype = torch.float64) -> list[dict[str, torch.Tensor]]:
    return [
        {"a": torch.randn(3, 2, dtype=dtype), "b": torch.randn(4, dtype=dtype)}
        for _ in range(bends + 2)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bends", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_ends_come_back_to_the_bit(kind: Any, bends: int, dtype: torch.dtype) -> None:
    w = points(bends, dtype)
    curve = Curve(tuple(w), kind)
    for t, end in ((0, w[0]), (1, w[-1])):
        assert all(torch.equal(curve.weights(t)[n], end[n]) for n in end)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bends", [1, 3])
def test_an_untrained_curve_is_the_segment(kind: Any, bends: int) -> None:
    a, b = ([torch.randn(50, dtype=torch.float64)] for _ in range(2))
    w = [a, *straight_bends(a, b, bends), b]
    curve = Curve(tuple({"w": p[0]} for p in w), kind)
    eps = torch.finfo(torch.float64).eps
    for t in GRID.tolist():
        torch.testing.assert_close(
            curve.weights(t)["w"], torch.lerp(a[0], b[0], t), rtol=0, atol=20 * eps
        )
    length = float((a[0] - b[0]).norm())
    assert curve.length() == pytest.approx(length, rel=1e-13)


def test_the_length_of_a_chain_is_that_of_its_segments() -> None:
    w = points(2)
    segments = [
        sum(float((q[n] - p[n]).square().sum()) for n in p) ** 0.5 for p, q in itertools.pairwise(w)
    ]
    assert Curve(tuple(w), "chain").length() == pytest.approx(sum(segments), rel=1e-12)
    # Against the weights themselves, on a curve that is no chain.
    t = torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=torch.float64)
    curve = Curve(tuple(w), "bezier")
    at = [curve.weights(s) for s in t.tolist()]
    expected = [
        sum(float((q[n] - p[n]).square().sum()) for n in p) ** 0.5
        for p, q in itertools.pairwise(at)
    ]
    found = step_lengths("bezier", [list(p.values()) for p in w], t)
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bends", [1, 3])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_gradient_of_a_bend_is_its_coefficient_times_that_at_phi(
    kind: Any, bends: int, decay: float
) -> None:
    a, b, *w = ([torch.randn(4, dtype=torch.float64)] for _ in range(bends + 2))
    live = [nn.Parameter(w[0][0].clone())]
    further = [[nn.Parameter(p[0].clone())] for p in w[1:]]
    moving = MovingCurve(live, a, b, further, kind, seed=0)

    def objective(x: torch.Tensor) -> torch.Tensor:
        return x.pow(3).sum() + x.prod() + 0.5 * decay * x.square().sum()

    t = 0.37
    leaves = [p[0].clone().requires_grad_() for p in w]
    c = coefficients(kind, bends + 2, t)
    phi = sum(f * p for f, p in zip(c, [a[0], *leaves, b[0]], strict=True))
    expected = torch.autograd.grad(objective(phi), leaves)
    moving.displace(t)
    gradient = torch.autograd.grad(live[0].pow(3).sum() + live[0].prod(), live)[0]
    moving.restore()
    assert torch.equal(live[0], w[0][0])
    others = moving.pull_back([0], [gradient], [decay], scaled=False)
    found = [gradient, *(o[0] for o in others)]
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)


def test_values_along_a_curve_in_numbers() -> None:
    t = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    v = torch.tensor([1.0, 4.0, 6.0, 3.0], dtype=torch.float64)
    found = statistics_of(t, v, torch.tensor([1.0, 1.0, 6.0], dtype=torch.float64))
    assert (found.start, found.end, found.minimum, found.maximum) == (1, 3, 1, 6)
    assert found.mean == pytest.approx(2.5 * 0.25 + 5 * 0.25 + 4.5 * 0.5)
    assert found.integral == pytest.approx((2.5 + 5 + 4.5 * 6) / 8)
    assert found.barrier_above_ends == 3
    assert found.barrier_above_line == pytest.approx(4)
    assert found.barrier_above_mean == 4
    cut = statistics_of(t[1:], v[1:], torch.ones(2, dtype=torch.float64))
    assert cut.barrier_above_ends != cut.barrier_above_ends
    assert cut.maximum == 6


def test_a_curve_comes_back_from_its_file(tmp_path: Any) -> None:
    rest = {"mean": torch.zeros(2), "seen": torch.tensor(3)}, {"mean": torch.ones(2),
                                                               "seen": torch.tensor(5)}  # fmt: skip
    curve = Curve(tuple(points(2)), "chain", *rest, {"tied": "a"})
    found = Curve.load(curve.save(tmp_path / "new" / "curve.pt"))
    for t in (0.0, 0.4, 1.0):
        expected, again = curve.weights(t), found.weights(t)
        assert expected.keys() == again.keys() == {"a", "b", "mean", "seen", "tied"}
        assert all(torch.equal(expected[n], again[n]) for n in expected)
    assert (found.kind, found.bends) == ("chain", 2)
    torch.save({"format": "other"}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="holds no curve"):
        Curve.load(tmp_path / "other.pt")


def test_curves_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="1 control points"):
        Curve(tuple(points(-1)))
    with pytest.raises(ValueError, match="control point 1 has other names"):
        Curve(({"a": torch.zeros(2)}, {"a": torch.zeros(3)}))
    with pytest.raises(ValueError, match="kind is 'spline'; give one of bezier, chain"):
        Curve(tuple(points(0)), "spline")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="t is 2"):
        Curve(tuple(points(0))).weights(2)

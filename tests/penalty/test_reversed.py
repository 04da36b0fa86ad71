"""The reversed cross entropy against extended precision and torch's own loss in float64."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, log_softmax

from lla_callbacks import reversed_binary_cross_entropy, reversed_cross_entropy
from lla_callbacks.penalty.reversed import ReversedBinaryCrossEntropy, ReversedCrossEntropy

EPS = {torch.float32: 1.2e-7, torch.float64: 2.3e-16}
MARGINS = [-100.0, -40.0, -17.0, -3.0, 0.0, 3.0, 15.0, 17.0, 40.0, 100.0]


def logits_of(margin, dtype):
    """Four classes, the label's logit so far above the largest other one."""
    return torch.tensor([[margin, 0.0, -1.5, -0.25]], dtype=dtype) + 0.5


def by_definition(z):
    """Value, gradient and Hessian of -log(1 - p_0) in extended precision, each in its own form."""
    z = z.detach().double().numpy().reshape(-1).astype(np.longdouble)
    shifted = np.exp(z - z.max())
    others = shifted[1:].sum()
    p = shifted[0] / shifted.sum()
    q = np.concatenate([[0], shifted[1:] / others])
    # 1 - p_0 from the other classes, not by subtraction.
    rest = others / shifted.sum()
    value = -np.log(rest) if rest < 0.5 else -np.log1p(-p)
    slope = -q
    slope[0] = 1
    curvature = p * (1 - p if p < 0.5 else rest) * np.outer(slope, slope)
    curvature[1:, 1:] -= p * (np.diag(q[1:]) - np.outer(q[1:], q[1:]))
    return value, p * slope, curvature


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("margin", MARGINS)
def test_value_gradient_and_second_derivative_at_any_margin(margin, dtype):
    z = logits_of(margin, dtype).requires_grad_()
    value, gradient, curvature = by_definition(z)
    found = reversed_cross_entropy(z, torch.tensor([0]))
    (first,) = torch.autograd.grad(found, z, create_graph=True)
    second = torch.stack(
        [torch.autograd.grad(g, z, retain_graph=True)[0].reshape(-1) for g in first.reshape(-1)]
    )
    # A rounded margin of up to 100 moves exp(margin) by so much.
    rounding = 8 * EPS[dtype] * (1 + abs(margin))
    tiny = torch.finfo(dtype).tiny
    assert abs(float(found.detach()) - float(value)) <= rounding * float(value) + tiny
    off = np.abs(first.detach().numpy()[0] - gradient).max()
    assert off <= rounding * abs(gradient).max() + tiny
    largest = np.abs(curvature).max()
    # Beside a margin of 100 the curvature that is left is that of the other classes.
    assert np.abs(second.detach().numpy() - curvature).max() <= rounding * largest + tiny
    assert second.isfinite().all()


def test_a_confident_label_is_unlearned_where_the_plain_form_fails():
    z = logits_of(30.0, torch.float32).requires_grad_()
    (found,) = torch.autograd.grad(reversed_cross_entropy(z, torch.tensor([0])), z)
    assert float(found[0, 0]) == pytest.approx(1.0, rel=1e-6)
    plain = -torch.log(1 - z.softmax(1)[:, 0] + 1e-12).sum()
    assert float(torch.autograd.grad(plain, z)[0][0, 0]) == 0.0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 3, 4)])
def test_shapes_reductions_and_ignored_labels(shape, reduction):
    source = torch.Generator().manual_seed(0)
    z = torch.randn(shape, generator=source, dtype=torch.float64)
    axis = 0 if len(shape) == 1 else 1
    y = torch.randint(0, 3, shape[:axis] + shape[axis + 1 :], generator=source)
    if y.ndim:
        y.view(-1)[1] = -100
    # As if the class itself were not there.
    complement = torch.log1p(-z.softmax(axis)).movedim(axis, -1).reshape(-1, 3)
    kept = y.reshape(-1) != -100
    rows = torch.arange(len(complement))
    singles = torch.where(kept, -complement[rows, y.reshape(-1).clamp(min=0)], 0.0)
    expected = {"none": singles.reshape(y.shape), "sum": singles.sum(), "mean": singles.sum()}
    expected["mean"] = expected["mean"] / kept.sum()
    found = reversed_cross_entropy(z, y, reduction=reduction)
    torch.testing.assert_close(found, expected[reduction], rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(ReversedCrossEntropy(reduction=reduction)(z, y), found)


def test_it_is_differentiable_twice():
    z = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z.requires_grad_()
    y = torch.tensor([0, 3, -100])

    def loss(z):
        return reversed_cross_entropy(z, y)

    assert torch.autograd.gradcheck(loss, z)
    assert torch.autograd.gradgradcheck(loss, z)


def test_two_classes_are_flipped_labels():
    z = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y = torch.tensor([0, 1, 1, 0, 1, 0])
    torch.testing.assert_close(reversed_cross_entropy(z, y), cross_entropy(z, 1 - y))
    one = z[:, 1] - z[:, 0]
    found = reversed_binary_cross_entropy(one, y.double())
    torch.testing.assert_close(found, cross_entropy(z, 1 - y))
    torch.testing.assert_close(found, binary_cross_entropy_with_logits(one, 1 - y.double()))
    torch.testing.assert_close(ReversedBinaryCrossEntropy()(one, y), found)


@pytest.mark.parametrize("margin", MARGINS)
def test_binary_at_any_margin(margin):
    z = torch.tensor([margin], dtype=torch.float64, requires_grad=True)
    value = reversed_binary_cross_entropy(z, torch.ones(1))
    (first,) = torch.autograd.grad(value, z, create_graph=True)
    (second,) = torch.autograd.grad(first, z)
    p = 1 / (1 + math.exp(-margin))
    expected = math.log1p(math.exp(-abs(margin))) + max(margin, 0.0)
    assert float(value.detach()) == pytest.approx(expected, rel=1e-14)
    assert float(first.detach()) == pytest.approx(p, rel=1e-14)
    assert float(second) == pytest.approx(p / (1 + math.exp(margin)), rel=1e-13, abs=3e-16)


def test_log_probabilities_are_logits():
    z = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    y = torch.tensor([0, 1, 2, 4])
    torch.testing.assert_close(
        reversed_cross_entropy(log_softmax(z, 1), y), reversed_cross_entropy(z, y)
    )


def test_half_precision_is_widened():
    z = torch.tensor([[30.0, 0.0]], dtype=torch.bfloat16)
    found = reversed_cross_entropy(z, torch.tensor([0]))
    assert (found.dtype, float(found)) == (torch.float32, 30.0)


@pytest.mark.parametrize(
    ("z", "y", "settings", "words"),
    [
        (torch.zeros(2, 3), torch.full((2, 3), 1 / 3), {}, "Soft labels"),
        (torch.zeros(2, 3), torch.zeros(2), {}, "one whole number a sample"),
        (torch.zeros(2, 1), torch.zeros(2).long(), {}, "another class"),
        (torch.zeros(2, 3), torch.full((2,), -100), {}, "mean of nothing"),
        (torch.zeros(2, 3), torch.zeros(2).long(), {"reduction": "max"}, "mean, sum, none"),
    ],
)
def test_what_has_no_reverse_is_refused(z, y, settings, words):
    with pytest.raises(ValueError, match=words):
        reversed_cross_entropy(z, y, **settings)


def test_soft_binary_labels_are_refused():
    with pytest.raises(ValueError, match="other than 0 and 1"):
        reversed_binary_cross_entropy(torch.zeros(2), torch.tensor([0.0, 0.9]))
    with pytest.raises(ValueError, match="one target a logit"):
        reversed_binary_cross_entropy(torch.zeros(2, 1), torch.zeros(2))

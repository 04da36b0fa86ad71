"""Products by differences of gradients: their step, their error, and what they leave untouched."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lla_callbacks.linalg.difference import DifferenceOperator, ErrorModel
from lla_callbacks.linalg.errors import MeasurementError, OutOfMemoryError
from lla_callbacks.linalg.hessian import HessianOperator
from lla_callbacks.linalg.loss_operator import LossTerm


def problem(activation, dtype=torch.float64, steps=0):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(5, 16), activation(), nn.Linear(16, 16), activation(), nn.Linear(16, 3)
    ).to(dtype)
    x, y = torch.randn(32, 5, dtype=dtype), torch.randint(3, (32,))
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()
    terms = [
        LossTerm(lambda: cross_entropy(net(x[:20]), y[:20]), 20 / 32),
        LossTerm(lambda: cross_entropy(net(x[20:]), y[20:]), 12 / 32),
    ]
    return net, terms, dict(net.named_parameters())


def relative(error, of):
    return float(error.norm() / of.norm())


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.SiLU, nn.Softplus])
@pytest.mark.parametrize("steps", [0, 300])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-6), (torch.float32, 2e-2)])
def test_smooth_networks_give_the_exact_product_within_the_stated_error(
    activation, steps, dtype, bound
):
    _, terms, parameters = problem(activation, dtype, steps)
    exact, difference = HessianOperator(terms, parameters), DifferenceOperator(terms, parameters)
    assert difference.loss == pytest.approx(exact.loss, rel=1e-6)
    torch.testing.assert_close(difference.gradient, exact.gradient)
    top = torch.randn(exact.shape[0], dtype=dtype, generator=torch.Generator().manual_seed(1))
    flat = top / top.norm()
    for _ in range(20):
        top = exact @ top
        top = top / top.norm()
    for vector in (flat, top, 100 * flat):
        wanted, found = exact @ vector, difference @ vector
        off, said = found - wanted, difference.engine_error(vector, found)
        assert relative(off, wanted) < bound
        # It may overstate truncation three times, and understate rounding, which is random.
        assert off.norm() < 2 * said.norm()
        assert said.norm() < 20 * off.norm() + 1e-9 * wanted.norm()


def test_kinks_show_as_an_error_that_is_not_small():
    _, terms, parameters = problem(nn.ReLU, torch.float32, 300)
    difference = DifferenceOperator(terms, parameters)
    vector = torch.randn(difference.shape[0], generator=torch.Generator().manual_seed(1))
    product = difference @ vector
    assert relative(difference.engine_error(vector, product), product) > 0.05


def test_the_product_does_not_depend_on_the_length_of_the_vector():
    _, terms, parameters = problem(nn.Tanh)
    difference = DifferenceOperator(terms, parameters)
    vector = torch.randn(difference.shape[0], dtype=torch.float64)
    torch.testing.assert_close(1e6 * (difference @ vector), difference @ (1e6 * vector))
    assert not bool((difference @ torch.zeros_like(vector)).any())


def test_a_block_of_vectors_is_its_columns_and_a_layer_its_rows():
    _, terms, parameters = problem(nn.Tanh)
    difference, exact = DifferenceOperator(terms, parameters), HessianOperator(terms, parameters)
    columns = torch.randn(difference.shape[0], 3, dtype=torch.float64)
    together = difference @ columns
    for k in range(3):
        assert torch.equal(together[:, k], difference @ columns[:, k])
    names = ["2.weight", "2.bias"]
    part = torch.randn(difference.block(names).shape[0], dtype=torch.float64)
    torch.testing.assert_close(
        difference.block(names) @ part, exact.block(names) @ part, rtol=1e-5, atol=1e-8
    )


def test_weights_come_back_to_the_bit_also_after_an_exception():
    net, terms, parameters = problem(nn.Tanh, torch.float32)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    versions = {name: p._version for name, p in parameters.items()}
    difference = DifferenceOperator(terms, parameters)
    vector = torch.randn(difference.shape[0])
    calls = 0

    def fails():
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ZeroDivisionError("in between")
        return net(torch.ones(1, 5)).sum()

    difference._terms = [LossTerm(fails, 1.0)]
    difference @ vector
    with pytest.raises(ZeroDivisionError):
        difference @ vector
    assert all(torch.equal(before[name], p) for name, p in parameters.items())
    # A graph that somebody still holds would fail if it saw a new version.
    assert versions == {name: p._version for name, p in parameters.items()}
    assert all(p.grad is None for p in parameters.values())


def test_weights_too_coarse_to_be_moved_are_refused():
    weight = nn.Parameter(torch.randn(4, dtype=torch.bfloat16))
    with pytest.raises(MeasurementError, match=r"bfloat16.*Leave out precision='training'"):
        DifferenceOperator([LossTerm(lambda: weight.square().sum(), 1.0)], {"w": weight})


def test_a_quadratic_at_the_origin_has_no_scale_and_still_a_product():
    weight = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    scale = torch.arange(1.0, 5.0, dtype=torch.float64)
    term = LossTerm(lambda: (scale * weight.square()).sum() / 2, 1.0)
    difference = DifferenceOperator([term], {"w": weight})
    torch.testing.assert_close(difference.to_dense(), torch.diag(scale))


@pytest.mark.parametrize(("truncation", "rounding"), [(1e-4, 1e-10), (1e-12, 1e-6), (1e-6, 1e-6)])
def test_the_error_model_finds_both_errors_back(truncation, rounding):
    # Squared changes between three steps, with independent errors of rounding.
    first = truncation * (1 - 1 / 16) ** 2 + rounding * 17
    second = truncation * 15**2 + rounding * (1 + 1 / 16)
    model = ErrorModel.of(first, second, 0.1)
    assert model.truncation == pytest.approx(truncation, rel=1e-6, abs=1e-13)
    assert model.rounding == pytest.approx(rounding, rel=1e-6, abs=1e-9)
    assert model.error(0.1) == pytest.approx(math.sqrt(truncation + rounding), rel=1e-3)


def without_memory_above(net, size):
    """Return terms of one batch that runs out of memory above a number of samples."""
    torch.manual_seed(1)
    x, y = torch.randn(16, 5, dtype=torch.float64), torch.randint(3, (16,))
    seen = []

    def term(part, weight, keep=True):
        def evaluate():
            seen.append(len(part))
            if len(part) > size:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return cross_entropy(net(x[part]), y[part])

        def halves():
            middle = len(part) // 2
            return [
                term(part[:middle], weight / 2, keep=False),
                term(part[middle:], weight / 2, keep=False),
            ]

        return LossTerm(evaluate, weight, keep, halves if len(part) > 1 else None)

    return term(list(range(16)), 1.0), seen


@pytest.mark.parametrize("kind", [HessianOperator, DifferenceOperator])
def test_out_of_memory_halves_batches_and_goes_on(kind):
    net, _, parameters = problem(nn.Tanh)
    plenty, _ = without_memory_above(net, 16)
    little, seen = without_memory_above(net, 4)
    vector = torch.randn(sum(p.numel() for p in parameters.values()), dtype=torch.float64)
    wanted = kind([plenty], parameters) @ vector
    operator = kind([little], parameters)
    torch.testing.assert_close(operator @ vector, wanted, rtol=1e-6, atol=1e-9)
    assert max(seen[seen.index(4) + 4 :], default=0) <= 8
    assert seen[-1] == 4


@pytest.mark.parametrize("kind", [HessianOperator, DifferenceOperator])
def test_no_memory_for_one_sample_is_named(kind):
    net, _, parameters = problem(nn.Tanh)
    none, _ = without_memory_above(net, 0)
    with pytest.raises(OutOfMemoryError, match=r"not enough memory.*Lower num_samples"):
        kind([none], parameters)


def test_out_of_memory_with_many_vectors_halves_the_chunk(monkeypatch):
    _, terms, parameters = problem(nn.Tanh)
    exact = HessianOperator(terms, parameters)
    columns = torch.randn(exact.shape[0], 7, dtype=torch.float64)
    wanted = exact @ columns
    chunked = HessianOperator(terms, parameters, chunk_size=8)
    backward, sizes = chunked._backward, []

    def greedy(gradients, part, chosen, **settings):
        sizes.append(part.shape[1])
        if part.shape[1] > 2:
            raise MemoryError("too many")
        return backward(gradients, part, chosen, **settings)

    monkeypatch.setattr(chunked, "_backward", greedy)
    torch.testing.assert_close(chunked @ columns, wanted)
    assert sizes == [7, 4, 2, 2, 2, 1]


def test_graphs_that_do_not_fit_are_dropped_and_built_anew(monkeypatch):
    _, terms, parameters = problem(nn.Tanh)
    exact = HessianOperator(terms, parameters)
    vector = torch.randn(exact.shape[0], dtype=torch.float64)
    wanted = exact @ vector
    other = HessianOperator(terms, parameters)
    backward, calls = other._backward, []

    def greedy(*arguments, **settings):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return backward(*arguments, **settings)

    monkeypatch.setattr(other, "_backward", greedy)
    torch.testing.assert_close(other @ vector, wanted)
    torch.testing.assert_close(other @ vector, wanted)
    assert all(gradient is None for gradient in other._kept)
    # The first call failed; then each product differentiates both batches.
    assert len(calls) == 1 + 2 + 2

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lla_callbacks.linalg.errors import NonFiniteError, NoSecondDerivativeError
from lla_callbacks.linalg.hessian import HessianOperator
from lla_callbacks.linalg.loss_operator import LossTerm
from lla_callbacks.linalg.space import ParameterSpace
from tests.cases import Tied, cross_entropy, dense_hessian, tanh_net, trainable


def terms(module: nn.Module, sizes: tuple[int, ...], keep: bool) -> tuple[list[LossTerm], list]:
    total = sum(sizes)
    batches = [(torch.randn(n, 4, dtype=torch.float64), torch.randint(0, 3, (n,))) for n in sizes]
    return [
        LossTerm(lambda b=b: cross_entropy(module, b), len(b[0]) / total, keep=keep)
        for b in batches
    ], batches


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_it_is_the_dense_hessian_whatever_the_chunking(keep: bool, chunk_size: int) -> None:
    module = tanh_net().double()
    parts, batches = terms(module, (7, 7, 2), keep)
    operator = HessianOperator(parts, trainable(module), chunk_size=chunk_size)
    dense = dense_hessian(module, batches, cross_entropy, "batch")
    found = operator.to_dense()
    torch.testing.assert_close(found, dense, atol=1e-7, rtol=0)
    torch.testing.assert_close(found, found.T, atol=1e-14, rtol=0)
    assert operator.num_matvecs == operator.shape[0]


def test_loss_and_gradient_come_with_it() -> None:
    module = tanh_net().double()
    parts, batches = terms(module, (5, 3), True)
    operator = HessianOperator(parts, trainable(module))
    loss = sum(len(b[0]) / 8 * cross_entropy(module, b) for b in batches)
    expected = torch.cat(
        [g.reshape(-1) for g in torch.autograd.grad(loss, list(module.parameters()))]
    )
    assert operator.loss == pytest.approx(float(loss.detach()), abs=1e-14)
    torch.testing.assert_close(operator.gradient, expected)


def test_a_block_is_the_principal_submatrix_on_the_same_graph() -> None:
    module = tanh_net().double()
    parts, _ = terms(module, (6,), True)
    operator = HessianOperator(parts, trainable(module))
    names = ["2.weight", "0.bias"]
    block = operator.block(names)
    index = operator.space.index(names)
    torch.testing.assert_close(block.to_dense(), operator.to_dense()[index][:, index])


def test_gradients_of_the_user_are_left_alone() -> None:
    module = tanh_net().double()
    module(torch.randn(3, 4, dtype=torch.float64)).sum().backward()
    kept = [p.grad.clone() for p in module.parameters()]
    parts, _ = terms(module, (6,), True)
    HessianOperator(parts, trainable(module)) @ torch.ones(43).double()
    assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), kept, strict=True))


def test_vectors_are_float32_for_half_precision_parameters() -> None:
    module = nn.Linear(4, 3).bfloat16()
    x = torch.randn(5, 4).bfloat16()
    operator = HessianOperator(
        [LossTerm(lambda: module(x).square().mean(), 1.0)], trainable(module)
    )
    assert operator.dtype == torch.float32
    assert (operator @ torch.ones(15)).dtype == torch.float32
    # The arithmetic is the parameters', and errors must not claim more.
    assert operator.eps == torch.finfo(torch.bfloat16).eps


def test_a_released_operator_says_so() -> None:
    module = tanh_net().double()
    operator = HessianOperator(terms(module, (4,), True)[0], trainable(module))
    operator.release()
    with pytest.raises(RuntimeError, match="released"):
        operator @ torch.ones(43).double()


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda p: (p * torch.nan).sum(), NonFiniteError, r"the loss is nan.*Lower the learning"),
        (lambda p: (p - 1).abs().sqrt().sum(), NonFiniteError, "gradient of the loss"),
        (lambda p: (p - 1).abs().pow(1.5).sum(), NonFiniteError, "product is not finite"),
        (lambda p: p * 2, ValueError, r"shape \(3,\).*must be a scalar"),
        (lambda p: torch.ones(()), ValueError, "requires_grad=False"),
    ],
)
def test_a_bad_loss_is_named_with_its_remedy(loss, error: type[Exception], message: str) -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(error, match=message):
        HessianOperator([LossTerm(lambda: loss(p), 1.0)], {"p": p}) @ torch.ones(3)


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor) -> Tensor:
        return g * 3 * ctx.saved_tensors[0] ** 2


def test_a_missing_second_derivative_is_named_with_its_remedy() -> None:
    p = nn.Parameter(torch.ones(3))
    operator_terms = [LossTerm(lambda: OnceOnly.apply(p).square().sum(), 1.0)]
    with pytest.raises(NoSecondDerivativeError, match=r"no second derivative.*Give loss="):
        HessianOperator(operator_terms, {"p": p}) @ torch.ones(3)


def test_a_tied_parameter_is_laid_out_once() -> None:
    module = Tied()
    both = {"a.weight": module.a.weight, "b.weight": module.b.weight, "b.bias": module.b.bias}
    space = ParameterSpace(both)
    assert space.names == ("a.weight", "b.bias")
    assert space.dim == 20


def test_flattening_goes_there_and_back() -> None:
    module = tanh_net()
    space = ParameterSpace(trainable(module))
    vector = torch.randn(space.dim)
    assert torch.equal(space.flatten(space.unflatten(vector)), vector)
    shapes = [p.shape for p in module.parameters()]
    assert [part.shape for part in space.unflatten(vector)] == shapes
    assert torch.equal(space.flatten([None] * 4), torch.zeros(space.dim))


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({}, ValueError, "no trainable parameter: unfreeze"),
        ({"p": torch.ones(2, dtype=torch.complex64)}, TypeError, "'p' is torch.complex64"),
        ({"p": torch.ones(2), "q": torch.ones(2, device="meta")}, ValueError, "several devices"),
    ],
)
def test_parameters_that_cannot_be_laid_out_are_refused(
    parameters: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ParameterSpace(parameters)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(KeyError, match="nothing"):
        ParameterSpace({"p": torch.ones(2)}).index(["nothing"])

"""The public operator against dense Hessians, and that it leaves the module alone."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lla_callbacks import MeasurementError, hessian_operator, measure_hessian
from tests.cases import CASES, Case, cross_entropy, dense_hessian, trainable


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("case", [CASES[i] for i in (0, 2, 3, 4, 5)], ids=lambda case: case.name)
@pytest.mark.parametrize("engine", ["exact", "difference"])
def test_products_are_those_of_the_dense_hessian(case: Case, engine: Any) -> None:
    module, batches, loss = case.build()
    before = state_of(module)
    operator = hessian_operator(module, batches, loss=loss, mode=case.mode, engine=engine)
    assert operator.engine == engine
    dense = dense_hessian(module, batches, loss, case.mode)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
    scale = float(dense.abs().max())
    # The reference is off by 1e-8; differences by their own truncation.
    within = 1e-7 if engine == "exact" else 1e-4
    block = torch.randn(operator.shape[0], 3, dtype=operator.dtype)
    assert operator.shape == dense.shape
    assert operator.dtype == torch.float64
    assert float((operator @ block - dense @ block).abs().max()) <= 10 * within * scale
    one = operator @ block[:, 0]
    assert one.shape == (len(dense),)
    assert float((one - dense @ block[:, 0]).abs().max()) <= 10 * within * scale
    assert operator.num_matvecs == 4
    assert all(p.grad is None for p in module.parameters())


def test_it_goes_to_parameter_names_and_back() -> None:
    module, batches, loss = CASES[4].build()  # tied
    operator = hessian_operator(module, batches, loss=loss)
    vector = torch.randn(operator.shape[0], dtype=torch.float64)
    named = operator.unflatten(vector)
    assert {k: v.shape for k, v in named.items()} == {
        name: p.shape for name, p in trainable(module).items()
    }
    assert torch.equal(operator.flatten(named), vector)
    alone = operator.flatten({"head.bias": named["head.bias"]})
    assert torch.equal(alone[-3:], named["head.bias"])
    assert not alone[:-3].any()
    with pytest.raises(ValueError, match=r"tensors has 'nobody'; give names among a\.weight, "):
        operator.flatten({"nobody": vector})
    with pytest.raises(ValueError, match=r"head\.bias has shape \(2,\); give \(3,\)"):
        operator.flatten({"head.bias": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"vector has shape \(2,\); give "):
        operator.unflatten(torch.zeros(2))


def test_scipy_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    module, batches, loss = CASES[0].build()
    operator = hessian_operator(module, batches, loss=loss)
    dense = dense_hessian(module, batches, loss, "batch").numpy()
    found = linalg.eigsh(operator.to_scipy(), k=3, which="LA", return_eigenvectors=False)
    assert np.allclose(found, np.linalg.eigvalsh(dense)[-3:], atol=1e-7)
    assert np.allclose(operator.to_scipy().T @ np.eye(len(dense))[:, :2], dense[:, :2], atol=1e-7)
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(ImportError, match="to_scipy needs scipy: pip install scipy"):
        operator.to_scipy()


def test_half_precision_weights_are_widened_for_every_product() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).bfloat16()
    batches = [(torch.randn(5, 4).bfloat16(), torch.randint(0, 2, (5,)))]
    wide = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    wide.load_state_dict(module.state_dict())
    dense = dense_hessian(wide, [(batches[0][0].double(), batches[0][1])], cross_entropy, "batch")
    # Without kept graphs each product evaluates the module anew.
    for allowed in (None, 1):
        operator = hessian_operator(module, batches, loss=cross_entropy, max_memory=allowed,
                                    engine="exact" if allowed is None else "auto")  # fmt: skip
        found = operator.to_dense().double()
        within = 1e-4 if operator.engine == "exact" else 2e-2
        assert float((found - dense).abs().max()) <= within * float(dense.abs().max())
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


def test_weights_that_moved_are_noticed() -> None:
    module, batches, loss = CASES[0].build()
    with hessian_operator(module, batches, loss=loss) as operator:
        vector = torch.ones(operator.shape[0], dtype=torch.float64)
        operator @ vector
        with torch.no_grad():
            next(module.parameters()).mul_(1.1)
        with pytest.raises(RuntimeError, match="weights have moved since this operator was made"):
            operator @ vector
        with torch.no_grad():
            next(module.parameters()).div_(1.1)
    module, batches, loss = CASES[0].build()
    operator = hessian_operator(module, batches, loss=loss)
    operator.release()
    with pytest.raises(RuntimeError, match="was released"):
        operator @ vector


def test_what_has_no_second_derivative_goes_on_by_differences() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.tanh()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return g * (1 - x.tanh() ** 2)

    module, batches, _ = CASES[0].build()

    def loss(m: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(Once.apply(m(batch[0])), batch[1])

    operator = hessian_operator(module, batches, loss=loss)
    assert operator.engine == "difference"
    assert "NoSecondDerivativeError" in operator.engine_reason
    with pytest.raises(MeasurementError, match="engine='auto'"):
        hessian_operator(module, batches, loss=loss, engine="exact")


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[5]], ids=lambda case: case.name)
def test_eigenvectors_are_the_leading_ones(case: Case) -> None:
    module, batches, loss = case.build()
    dense = dense_hessian(module, batches, loss, case.mode)
    true = torch.linalg.eigvalsh(dense).flip(0)
    found = measure_hessian(
        module, batches, loss=loss, mode=case.mode, num_eigenvectors=4, num_steps=5, num_probes=2
    ).eigenvectors
    assert found is not None
    assert len(found) == 4
    assert torch.allclose(found.values, true[:4], atol=1e-4 * float(true[0]))
    assert (found.vectors.T @ found.vectors - torch.eye(4)).abs().max() < 1e-12
    left = dense @ found.vectors - found.vectors * found.values
    assert (left.norm(dim=0) <= found.residuals + 1e-7).all()
    assert (found.residuals <= 2e-3 * found.values.abs()).all()
    assert all(found.settled)
    largest = found.vectors.gather(0, found.vectors.abs().argmax(dim=0, keepdim=True))
    assert (largest > 0).all()
    named = found[1]
    assert {k: v.shape for k, v in named.items()} == {
        name: p.shape for name, p in trainable(module).items()
    }
    assert torch.equal(torch.cat([v.reshape(-1) for v in named.values()]), found.vectors[:, 1])


class Quadratic(nn.Module):
    def __init__(self, values: list[float]) -> None:
        super().__init__()
        torch.manual_seed(3)
        n = len(values)
        basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
        self.register_buffer("matrix", basis @ torch.tensor(values).double().diag() @ basis.T)
        self.w = nn.Parameter(torch.randn(n, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w @ self.matrix @ self.w / 2 + 0 * x.sum()


@pytest.mark.parametrize(
    "values",
    [
        [3.0, 3.0, 3.0, 1.0, 0.5, 0.0, -1.0],
        [2.0] * 6,
        [0.0] * 4,
        [5.0, 2.0, 2.0, 2.0, 1.9, 1.0, 0.0, -7.0],
        [-1.0, -2.0, -2.0],
    ],
    ids=str,
)
def test_eigenvalues_that_come_several_times_are_found_as_often(values: list[float]) -> None:
    found = measure_hessian(
        Quadratic(values), [torch.ones(1)], loss=lambda m, b: m(b), num_eigenvectors=3,
        num_steps=2, num_probes=2, check=False,
    ).eigenvectors  # fmt: skip
    assert found is not None
    assert torch.allclose(
        found.values, torch.tensor(sorted(values)[:-4:-1], dtype=torch.float64), atol=1e-4
    )
    with pytest.raises(ValueError, match=f"num_eigenvectors is 9; give at most {len(values)}"):
        measure_hessian(Quadratic(values), [torch.ones(1)], loss=lambda m, b: m(b),
                        num_eigenvectors=9, check=False)  # fmt: skip

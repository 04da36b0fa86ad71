"""The Hessian of a part of the parameters, against the block of the dense one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lla_callbacks import (
    basin_radii,
    convexity_map,
    hessian_operator,
    loss_line,
    loss_plane,
    measure_hessian,
)
from lla_callbacks.linalg.space import ParameterSpace
from tests.cases import CASES, Tied, cross_entropy, dense_hessian, trainable

PARTS: dict[str, tuple[int, Any, list[str]]] = {
    "a pattern": (0, "0.*", ["0.weight", "0.bias"]),
    "a module": (0, "2", ["2.weight", "2.bias"]),
    "several": (0, ["0.bias", "*.weight"], ["0.weight", "0.bias", "2.weight"]),
    "a predicate": (0, lambda name, p: p.ndim > 1, ["0.weight", "2.weight"]),
    "another name of a tied one": (4, ["b.weight", "head"],
                                   ["a.weight", "head.weight", "head.bias"]),
    "beside what is frozen": (3, "2.*", ["2.weight", "2.bias"]),
    "batch norm's": (5, "1", ["1.weight", "1.bias"]),
    "the default": (0, None, ["0.weight", "0.bias", "2.weight", "2.bias"]),
}  # fmt: skip


@pytest.mark.parametrize("engine", ["exact", "difference"])
@pytest.mark.parametrize("name", PARTS)
def test_it_is_the_block_of_the_whole(name: str, engine: Any) -> None:
    number, parameters, names = PARTS[name]
    module, batches, loss = CASES[number].build()
    flags = [p.requires_grad for p in module.parameters()]
    before = [p.clone() for p in module.parameters()]
    operator = hessian_operator(module, batches, loss=loss, parameters=parameters, engine=engine)
    assert list(operator.names) == names
    whole = dense_hessian(module, batches, loss, "batch")
    rows = ParameterSpace(trainable(module)).index(names)
    block = whole[rows][:, rows]
    within = 1e-6 if engine == "exact" else 1e-3
    assert float((operator.to_dense() - block).abs().max()) <= within * float(block.abs().max())
    assert [p.requires_grad for p in module.parameters()] == flags
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_a_report_is_of_the_part() -> None:
    module, batches, loss = CASES[0].build()
    head = [module[2].weight, module[2].bias]
    sgd = torch.optim.SGD(module.parameters(), lr=0.5)
    report = measure_hessian(
        module, batches, loss=loss, parameters="2.*", optimizer=sgd, num_eigenvectors=1
    )
    whole = dense_hessian(module, batches, loss, "batch")
    values = torch.linalg.eigvalsh(whole[-18:, -18:])
    assert report.num_params == 18
    assert list(report.layers) == ["2"]
    assert report.lambda_max == pytest.approx(float(values[-1]), rel=1e-6)
    assert abs(report.trace - float(values.sum())) <= 5 * report.trace_sem + 1e-6
    assert report.criteria["stability"] == pytest.approx(0.25 * report.lambda_max, rel=1e-6)
    flat = torch.cat([p.detach().reshape(-1) for p in head])
    assert report.weight_norm == pytest.approx(float(flat.norm()))
    assert report.eigenvectors is not None
    assert list(report.eigenvectors[0]) == ["2.weight", "2.bias"]
    head_of_ggn = measure_hessian(module, batches, loss=loss, parameters="2.*", matrix="ggn")
    # A linear layer under a convex criterion curves by nothing else.
    assert head_of_ggn.gauss_newton_share == pytest.approx(1.0, abs=1e-9)


def moved(function: Callable[..., Any], **more: Any) -> Any:
    module, batches, loss = CASES[0].build()
    return function(module, batches, loss=loss, parameters="2", **more), module, batches


def test_slices_move_the_part_alone() -> None:
    line, module, batches = moved(loss_line, directions="top1", alphas=[-0.5, 0.0, 0.5])
    (direction,) = line.directions
    assert direction.vector.shape == (18,)
    with torch.no_grad():
        weight, bias = direction.vector.split([15, 3])
        module[2].weight += 0.5 * weight.reshape(3, 5)
        module[2].bias += 0.5 * bias
    assert float(line.loss[2]) == pytest.approx(cross_entropy(module, batches[0]).item())
    plane, *_ = moved(loss_plane, alphas=[0.0, 1.0], betas=[0.0])
    assert plane.directions[0].vector.shape == (18,)
    radii, *_ = moved(basin_radii, num_rays=2, rtol=0.5)
    # Weights of the head: biases stand still.
    assert radii.dim == 15
    ends, *_ = moved(convexity_map, alphas=[0.0], betas=[0.0], num_steps=18)
    module, batches, loss = CASES[0].build()
    values = torch.linalg.eigvalsh(dense_hessian(module, batches, loss, "batch")[-18:, -18:])
    assert float(ends.lambda_max) == pytest.approx(float(values[-1]), rel=1e-5)
    own, *_ = moved(loss_line, directions={"2.bias": torch.ones(3)}, alphas=[0.0])
    assert own.directions[0].vector.count_nonzero() == 3
    with pytest.raises(ValueError, match=r"parameters is '2'.*moves all that they differ in; give"):
        loss_plane(module, batches, loss=loss, parameters="2", directions=[module, module, module])


def test_what_matches_nothing_is_told_with_the_names_there_are() -> None:
    module, batches, loss = CASES[3].build()  # the first layer is frozen

    def measure(parameters: Any) -> None:
        hessian_operator(module, batches, loss=loss, parameters=parameters)

    with pytest.raises(
        ValueError,
        match=r"parameters contains 'head\.\*', which matches no trained parameter; give patterns "
        r"of names among 2\.weight, 2\.bias\.",
    ):
        measure(["2.*", "head.*"])
    with pytest.raises(ValueError, match=r"\(it matches 0\.weight, 0\.bias, frozen by requires_"):
        measure("0")
    with pytest.raises(ValueError, match="a predicate that is true for no trained parameter; give"):
        measure(lambda name, parameter: False)
    many = nn.ModuleList(nn.Linear(1, 1) for _ in range(10))
    with pytest.raises(ValueError, match=r"among 0\.weight, .*5\.bias and 8 more"):
        hessian_operator(many, batches, loss=loss, parameters="x")


@pytest.mark.parametrize("wrong", [3, [], [""], "", ["a", 1], nn.Linear, nn.Linear(1, 1), {"a": 1}])
def test_what_is_no_choice_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"parameters is .*; give None for all that are trained"):
        measure_hessian(Tied(), [torch.ones(1, 4)], loss=lambda m, b: m(b).sum(), parameters=wrong)


def test_a_predicate_takes_two() -> None:
    def one(name: str) -> bool:
        return True

    with pytest.raises(ValueError, match=r"parameters takes \(name.*; give parameters\(name, "):
        measure_hessian(
            Tied(), [torch.ones(1, 4)], loss=lambda m, b: m(b).sum(),
            parameters=one,  # type: ignore[arg-type]
        )  # fmt: skip


def test_lora_factors_are_a_part() -> None:
    class LoRA(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(4, 3)
            self.lora_A = nn.Linear(4, 2, bias=False)
            self.lora_B = nn.Linear(2, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.lora_B(self.lora_A(x))

    torch.manual_seed(0)
    module = LoRA().double()
    batches = [(torch.randn(6, 4, dtype=torch.float64), torch.randint(0, 3, (6,)))]
    operator = hessian_operator(module, batches, loss=cross_entropy, parameters="*lora_*")
    assert operator.names == ("lora_A.weight", "lora_B.weight")
    whole = dense_hessian(module, batches, cross_entropy, "batch")
    assert torch.allclose(operator.to_dense(), whole[15:, 15:], atol=1e-6)

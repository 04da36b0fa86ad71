"""An objective proves itself: silent on what is right, and right on what is not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lla_callbacks import (
    HessianReport,
    convexity_map,
    hessian_operator,
    loss_line,
    loss_plane,
    measure_hessian,
)
from lla_callbacks.hessian.measures import CRITERIA
from lla_callbacks.linalg.errors import MeasurementError, NoSecondDerivativeError
from lla_callbacks.objective import value_checks
from lla_callbacks.objective.engines import prove, with_hessian
from lla_callbacks.objective.objective import Objective
from lla_callbacks.objective.product_checks import count_kinks
from lla_callbacks.objective.self_check import SelfCheck
from lla_callbacks.objective.value_checks import prove_values
from lla_callbacks.report.plain import pack, unpack
from tests.cases import CASES
from tests.kinds import (
    KINDS,
    Calling,
    DetachedCube,
    cross_entropy,
    dense_by_differences,
    tanh_net,
    vectors,
)

NAMES = {"repeats", "slope", "gradient", "symmetry", "product"}


def as_float(thing: Any) -> Any:
    if isinstance(thing, Tensor):
        return thing.float() if thing.is_floating_point() else thing
    if isinstance(thing, dict):
        return {key: as_float(item) for key, item in thing.items()}
    if isinstance(thing, (list, tuple)):
        return type(thing)(as_float(item) for item in thing)
    return thing


def proved(objective: Objective) -> tuple[SelfCheck, str]:
    """What an objective proves, and the engine that its products come from in the end."""
    try:
        engine, _ = with_hessian(objective, lambda hessian: hessian.engine)
    except NoSecondDerivativeError:
        engine = ""
    found = objective.findings.proof.self_check
    assert found is not None
    return found, engine


LIST = [(k.name, k.build, k.mode) for k in KINDS] + [
    (f"case, {c.name}", c.build, c.mode) for c in CASES
]
# A mask that is made in float64, and a form that torch warns about.
DOUBLE_ONLY = {"attention, additive mask", "LSTM, projected"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "build", "mode"), LIST, ids=[name for name, _, _ in LIST])
def test_nothing_is_complained_of_where_all_is_right(
    name: str, build: Callable[[], Any], mode: str, dtype: torch.dtype
) -> None:
    if name.startswith("GPT-2"):
        pytest.importorskip("transformers")
    module, batches, loss = build()
    if dtype == torch.float32:
        if name in DOUBLE_ONLY:
            return
        module, batches = module.float(), as_float(batches)
    found, engine = proved(Objective(module, batches, loss, mode=mode))
    assert {c.outcome for c in found.checks} == {"passed"}
    asked = {c.name for c in found.checks}
    assert asked == (NAMES if engine == "exact" else {"repeats", "slope", "symmetry"})
    # 2 + 4 + 4 values, a gradient for them, another and a difference of two for products.
    most = 10 / 3 + 1 + (3 if engine == "exact" else 0)
    # Where half of the digits did not do, another step, or a second difference.
    assert found.num_gradients <= most + 4 / 3 + 2


# -- what is wrong --------------------------------------------------------------------------------


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Stairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def many() -> Any:
    return torch.randn(512, 4, dtype=torch.float64), torch.randint(0, 3, (512,))


def bootstrapped(module: Any, batch: Any) -> Tensor:
    target = 0.9 * module(batch[0].flip(0)).max(1)[0].detach()
    return (module(batch[0])[:, 0] - target).square().mean()


def quantized(module: Any, batch: Any) -> Tensor:
    out = module(batch[0])
    return (out + (out.round() - out).detach()).sin().square().mean()


def binary_weights(module: Any, batch: Any) -> Tensor:
    w = module[0].weight
    binary = w + (w.sign() * w.abs().mean() - w).detach()
    return F.cross_entropy(module[2](F.linear(batch[0], binary).tanh()), batch[1])


def fake_quantized(module: Any, batch: Any) -> Tensor:
    hidden = torch.fake_quantize_per_tensor_affine(module[0](batch[0]), 0.1, 0, -128, 127)
    return F.cross_entropy(module[2](hidden.tanh()), batch[1])


def half_detached(module: Any, batch: Any) -> Tensor:
    # The gradient is right wherever it is not zero: only another direction tells.
    hidden = module[0](batch[0]).tanh()
    return F.cross_entropy(F.linear(hidden, module[2].weight.detach(), module[2].bias), batch[1])


JACOBIANS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], Any]] = {
    "gradient reversal": (lambda: Calling(Reversed.apply), vectors, cross_entropy),
    "gradient reversal, one branch": (
        lambda: Calling(Reversed.apply, add=True), vectors, cross_entropy,
    ),
    "straight-through": (lambda: Calling(Stairs.apply), vectors, cross_entropy),
    "straight-through, many steps": (lambda: Calling(Stairs.apply), many, cross_entropy),
    "stop-gradient target": (tanh_net, vectors, bootstrapped),
    "vector quantization": (tanh_net, many, quantized),
    "binary weights": (tanh_net, many, binary_weights),
    "quantization-aware training": (tanh_net, vectors, fake_quantized),
    "detached weights": (tanh_net, vectors, half_detached),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", JACOBIANS)
def test_a_gradient_that_is_no_derivative_is_found(name: str, dtype: torch.dtype) -> None:
    make, batch, loss = JACOBIANS[name]
    torch.manual_seed(1)
    module = make().to(dtype)
    x, y = batch()
    found = prove(Objective(module, [(x.to(dtype), y)], loss))
    assert found is not None
    assert found.outcome("repeats") == "passed"
    assert found.outcome("slope") == "failed"
    assert "Jacobian" in found.trouble
    assert "jacobian='measure'" in found.remedy


@pytest.mark.parametrize("name", ["", *JACOBIANS])
def test_a_small_loss_is_asked_about_in_float64_first_and_judged_alike(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, batch, loss = JACOBIANS[name] if name else (tanh_net, vectors, cross_entropy)
    torch.manual_seed(1)
    module = make().float()
    x, y = batch()

    def small(module: Any, batch: Any) -> Tensor:
        return 1e-5 * loss(module, batch)

    seen: list[torch.dtype] = []
    verdict = value_checks._Slopes.verdict

    def noted(self: Any, *, early: bool = False) -> Any:
        seen.append(self._prober.space.dtype)
        return verdict(self, early=early)

    monkeypatch.setattr(value_checks._Slopes, "verdict", noted)
    found = prove(Objective(module, [(x.float(), y)], small))
    assert found is not None
    assert found.outcome("slope") == ("failed" if name else "passed")
    # Where float64 says yes there is nothing left to ask.
    assert seen == [torch.float64, torch.float32][: 2 if name else 1]


def target_report(**settings: Any) -> HessianReport:
    torch.manual_seed(1)
    module = tanh_net().double()
    return measure_hessian(
        module, [vectors()], loss=bootstrapped, num_steps=43, num_probes=200, **settings
    )


def test_a_jacobian_is_a_gap_unless_it_is_asked_for_and_is_marked_then(tmp_path: Any) -> None:
    gap = target_report()
    assert math.isnan(gap.lambda_max)
    assert math.isnan(gap.trace)
    assert {"lambda_max", "trace", "density", "criteria"} <= gap.gaps.keys()
    assert gap.loss > 0
    assert gap.gradient_norm > 0
    assert "Jacobian of the training gradient" in gap.summary()
    assert "jacobian='measure'" in gap.summary()
    assert not gap.is_hessian
    gap.figure()
    marked = target_report(jacobian="measure")
    assert not marked.gaps
    assert "Jacobian of the training gradient, no Hessian" in marked.summary()
    assert not marked.is_hessian
    # Of what it is said to be: the derivative of the gradient that training uses.
    torch.manual_seed(1)
    module, batch = tanh_net().double(), vectors()
    dense = dense_by_differences(module, [batch], bootstrapped, "batch")
    assert marked.engine == "difference"
    assert marked.trace == pytest.approx(float(dense.trace()), rel=1e-6)
    texts = [t.get_text() for t in marked.figure().findobj() if hasattr(t, "get_text")]
    assert any("no Hessian" in text for text in texts)
    unasked = target_report(check=False)
    assert unasked.self_check is None
    assert math.isfinite(unasked.trace)


def test_the_outcome_is_in_the_report_in_words_in_arrays_and_in_its_plain_form(
    tmp_path: Any,
) -> None:
    import numpy as np

    module, batches, loss = CASES[0].build()
    report = measure_hessian(module, batches, loss=loss, num_steps=4, num_probes=4)
    assert report.self_check is not None
    assert "self-check: 5 of 5 passed, at the price of 7.3 gradients" in report.summary()
    texts = [t.get_text() for t in report.figure().findobj() if hasattr(t, "get_text")]
    assert any("self-check passed" in text for text in texts)
    stored = np.load(report.save(tmp_path / "report.npz"))
    assert set(stored["check_names"]) == NAMES
    assert set(stored["check_outcomes"]) == {"passed"}
    assert unpack(pack(report)).self_check == report.self_check
    # Where there is a gap, they are all NaN.
    assert set(CRITERIA) == report.criteria.keys()


def test_products_of_the_check_are_those_that_the_measurement_begins_with() -> None:
    module, batches, loss = CASES[0].build()
    reports = [
        measure_hessian(module, batches, loss=loss, num_steps=6, num_probes=6, check=check)
        for check in (True, False)
    ]
    assert reports[0].num_matvecs == reports[1].num_matvecs
    assert torch.equal(reports[0].nodes, reports[1].nodes)
    assert reports[0].trace == reports[1].trace


def decayed(module: nn.Module, batch: Any) -> Tensor:
    # Autograd's second derivative of a squared norm at zero is 0 / 0.
    norms = [p.norm() ** 2 for p in module.parameters()]
    return cross_entropy(module, batch) + 0.1 * torch.stack(norms).sum()


def test_the_square_of_a_norm_at_zero_is_measured_by_differences() -> None:
    module = tanh_net().double()
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)
    batch = vectors()
    report = measure_hessian(module, [batch], loss=decayed, num_steps=40, num_probes=40)
    assert report.engine == "difference"
    assert "product is not finite" in report.engine_reason
    ends = torch.linalg.eigvalsh(dense_by_differences(module, [batch], decayed, "batch"))
    assert float(report.lambda_max) == pytest.approx(float(ends[-1]), abs=1e-6)
    assert float(report.lambda_min) == pytest.approx(float(ends[0]), abs=1e-6)
    with hessian_operator(module, [batch], loss=decayed) as operator:
        assert torch.isfinite(operator @ torch.ones(len(ends), 1, dtype=torch.float64)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_in_fewer_digits_than_the_weights_is_not_accused(dtype: torch.dtype) -> None:
    module, batch = tanh_net().double(), vectors()

    def rounded(module: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(module, batch).to(dtype)

    report = measure_hessian(module, [batch], loss=rounded, num_steps=40, num_probes=40)
    exact = measure_hessian(module, [batch], loss=cross_entropy, num_steps=40, num_probes=40)
    eps = torch.finfo(dtype).eps
    assert report.lambda_max == pytest.approx(exact.lambda_max, rel=10 * eps)
    assert report.self_check is not None
    assert not report.self_check.trouble


def test_a_second_derivative_that_is_lost_is_found_and_measured_by_differences() -> None:
    torch.manual_seed(1)
    module, batch = Calling(DetachedCube.apply).double(), vectors()
    report = measure_hessian(module, [batch], loss=cross_entropy, num_steps=35, num_probes=35)
    assert report.engine == "difference"
    assert "the second derivative is lost" in report.engine_reason
    dense = dense_by_differences(module, [batch], cross_entropy, "batch")
    top = float(torch.linalg.eigvalsh(dense)[-1])
    assert float(report.lambda_max) == pytest.approx(top, abs=1e-6)
    with pytest.raises(NoSecondDerivativeError, match=r"lost on the way.*engine='difference'"):
        measure_hessian(module, [batch], loss=cross_entropy, engine="exact")
    # The remedy is one.
    asked = measure_hessian(module, [batch], loss=cross_entropy, engine="difference")
    assert float(asked.lambda_max) == pytest.approx(top, abs=1e-6)
    assert not asked.gaps


def test_the_exact_engine_stays_refused_on_the_same_batches() -> None:
    torch.manual_seed(1)
    module, batch = Calling(DetachedCube.apply).double(), vectors()
    objective = Objective(module, [batch], cross_entropy)
    assert [with_hessian(objective, lambda h: h.engine)[0] for _ in range(2)] == ["difference"] * 2


@pytest.mark.parametrize("kind", ["counter", "generator"])
def test_a_loss_that_does_not_repeat_is_said_and_has_no_hessian(kind: str) -> None:
    calls = [0]
    generator = torch.Generator()

    def loss(module: Any, batch: Any) -> Tensor:
        calls[0] += 1
        noise = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        if kind == "counter":
            return cross_entropy(module, batch) * (1 + 0.01 * calls[0])
        return F.cross_entropy(module(batch[0] + 0.1 * noise), batch[1])

    torch.manual_seed(1)
    module, batch = tanh_net().double(), vectors()
    report = measure_hessian(module, [batch], loss=loss)
    assert "two evaluations at the same weights and batches differ" in report.gaps["lambda_max"]
    assert "check=False" in report.summary()
    assert math.isfinite(measure_hessian(module, [batch], loss=loss, check=False).lambda_max)
    line = loss_line(module, [batch], loss=loss, alphas=[-1, 0, 1])
    assert line.facts.self_check == "self-check failed: the loss does not repeat"


# -- hooks on tensors -----------------------------------------------------------------------------


def deep_equilibrium(hook: bool) -> Callable[[Any, Any], Tensor]:
    """The same loss by implicit differentiation in a hook, and by unrolling."""

    def loss(module: Any, batch: Any) -> Tensor:
        x = batch[0]

        def step(z: Tensor) -> Tensor:
            return 0.4 * torch.tanh(module(z)) + x

        if not hook:
            z = x
            for _ in range(50):
                z = step(z)
            return z.square().mean()
        with torch.no_grad():
            z = x
            for _ in range(50):
                z = step(z)
        z = step(z)
        start = z.detach().requires_grad_()
        after = step(start)

        def implicit(gradient: Tensor) -> Tensor:
            y = gradient
            for _ in range(40):
                y = torch.autograd.grad(after, start, y, retain_graph=True)[0] + gradient
            return y

        if z.requires_grad:
            z.register_hook(implicit)
        return z.square().mean()

    return loss


def test_a_hook_that_is_part_of_the_derivative_is_kept() -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 3).double()
    batch = (torch.randn(8, 3, dtype=torch.float64),)
    settings: dict[str, Any] = {"num_steps": 12, "num_probes": 4}
    found = measure_hessian(module, [batch], loss=deep_equilibrium(True), **settings)
    right = measure_hessian(module, [batch], loss=deep_equilibrium(False), **settings)
    assert right.engine == "exact"
    assert found.engine == "difference"
    assert found.self_check is not None
    assert found.self_check.hooks == "kept"
    assert found.gradient_norm == pytest.approx(right.gradient_norm, rel=1e-6)
    assert float(found.lambda_max) == pytest.approx(float(right.lambda_max), rel=1e-5)
    assert float(found.lambda_min) == pytest.approx(float(right.lambda_min), rel=1e-5)
    with pytest.raises(NoSecondDerivativeError, match=r"hook .* part of the derivative"):
        measure_hessian(module, [batch], loss=deep_equilibrium(True), engine="exact")


@pytest.mark.parametrize("hook", [lambda g: -g, lambda g: g.clamp(-1e-3, 1e-3), lambda g: None])
def test_a_hook_that_training_alone_wants_is_not_called(hook: Callable[[Tensor], Any]) -> None:
    called = []

    def loss(module: Any, batch: Any) -> Tensor:
        hidden = torch.tanh(module[0](batch[0]))
        if hidden.requires_grad:
            hidden.register_hook(lambda g: (called.append(1), hook(g))[1])
        return F.cross_entropy(module[2](hidden), batch[1])

    torch.manual_seed(1)
    module, batch = tanh_net().double(), vectors()
    found = measure_hessian(module, [batch], loss=loss, num_steps=8, num_probes=4)
    plain = measure_hessian(module, [batch], loss=cross_entropy, num_steps=8, num_probes=4)
    assert float(found.lambda_max) == pytest.approx(float(plain.lambda_max), rel=1e-12)
    assert found.self_check is not None
    assert found.self_check.hooks == "left out"
    assert called == []


def test_spectral_norm_in_training_turns_with_the_weights() -> None:
    torch.manual_seed(1)
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    for _ in range(50):
        layer(torch.randn(2, 4))
    module = nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 3)).double()
    found, engine = proved(Objective(module, [vectors()], cross_entropy))
    assert engine == "difference"
    assert found.outcome("slope") == "passed"


@pytest.mark.parametrize("kind", [nn.Tanh, nn.ReLU])
def test_statistics_that_are_estimated_anew_are_held_by_the_check_too(kind: Any) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), kind(), nn.Linear(6, 3)).double()
    found, engine = proved(
        Objective(module, [vectors(), vectors()], cross_entropy, mode="recalibrate")
    )
    assert engine == "exact"
    assert {c.outcome for c in found.checks} == {"passed"}


# -- kinks, slices, maps --------------------------------------------------------------------------


def relu_net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)
    )


def test_kinks_are_not_taken_for_a_lost_derivative() -> None:
    torch.manual_seed(1)
    module = relu_net()
    x, y = many()
    found, engine = proved(Objective(module, [(x.float(), y)], cross_entropy))
    assert engine == "exact"
    assert found.outcome("product") == "not decided"
    assert found.outcome("slope") == "passed"
    # Which is so of every such network, and so is no news.
    assert found.footer() == "self-check passed"
    assert found.lines()[0].startswith("self-check: 4 of 4 passed, at the price of")
    assert "not decided" not in "".join(found.lines())
    # What a reader can do something about is said.
    checks = [c if c.name != "slope" else replace(c, outcome="not decided") for c in found.checks]
    open_one = replace(found, checks=tuple(checks))
    assert open_one.footer() == "self-check passed (not decided: slope)"
    assert "3 of 4 passed, 1 not decided" in open_one.lines()[0]
    assert "in float64 (a module and batches in double) it can be told" in open_one.lines()[1]
    # In float64 steps are too short to meet any.
    assert proved(Objective(module.double(), [(x, y)], cross_entropy))[0].outcome("product") == (
        "passed"
    )
    assert count_kinks(cross_entropy(module, (x, y))) == 2 * 512 * 32


def test_slices_are_told_of_the_slope_and_keep_their_values() -> None:
    torch.manual_seed(1)
    module, batch = tanh_net().double(), vectors()
    settings: dict[str, Any] = {"loss": bootstrapped, "alphas": [-1, 0, 1]}
    line = loss_line(module, [batch], **settings)
    silent = loss_line(module, [batch], check=False, **settings)
    assert torch.equal(line.loss, silent.loss)
    assert "values hold" in line.facts.self_check
    assert silent.facts.self_check == ""
    plane = loss_plane(module, [batch], loss=cross_entropy, alphas=[-1, 0, 1], betas=[0, 1])
    assert plane.facts.self_check == "self-check passed"
    with pytest.raises(MeasurementError, match="no Hessian"):
        loss_line(module, [batch], directions="top1", **settings)
    with pytest.raises(MeasurementError, match="no Hessian"):
        convexity_map(module, [batch], betas=[0], **settings)


def test_a_map_of_curvature_takes_the_engine_that_can() -> None:
    torch.manual_seed(1)
    module, batch = Calling(DetachedCube.apply).double(), vectors()
    settings: dict[str, Any] = {"loss": cross_entropy, "alphas": [0], "betas": [0]}
    found = convexity_map(module, [batch], num_steps=35, **settings)
    dense = dense_by_differences(module, [batch], cross_entropy, "batch")
    top = float(torch.linalg.eigvalsh(dense)[-1])
    assert float(found.lambda_max[0, 0]) == pytest.approx(top, rel=1e-3)


def test_weights_and_gradients_are_left_as_they_were() -> None:
    torch.manual_seed(1)
    module, batch = tanh_net().double(), vectors()
    cross_entropy(module, batch).backward()
    kept = [(p, p.clone(), p.grad, p._version) for p in module.parameters()]
    state = torch.get_rng_state()
    proved(Objective(module, [batch], cross_entropy))
    assert torch.equal(torch.get_rng_state(), state)
    for p, value, gradient, version in kept:
        assert torch.equal(p, value)
        assert p.grad is gradient
        assert p._version == version


def test_the_rounding_of_a_fitted_network_is_no_staircase() -> None:
    """Its loss of 1e-4 comes from outputs of 30, and is rounded as they are."""
    torch.manual_seed(1)
    x, y = torch.randn(64, 16), torch.arange(64) % 4
    rows = [
        layer
        for size in (16, 24, 24)
        for layer in (nn.Linear(size, 24, bias=False), nn.BatchNorm1d(24), nn.ReLU())
    ]
    module = nn.Sequential(*rows, nn.Linear(24, 4))
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    for _ in range(250):
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
    for seed in range(5):
        objective = Objective(
            module, [(x, y)], loss=lambda m, b: F.cross_entropy(m(b[0]), b[1]), seed=seed
        )
        slope = next(c for c in prove_values(objective).checks if c.name == "slope")
        assert slope.outcome != "failed", slope

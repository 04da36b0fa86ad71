"""Every kind of module against a dense Hessian, and left as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from lla_callbacks import MeasurementError, loss_line, measure_hessian
from lla_callbacks.linalg.errors import NoSecondDerivativeError
from lla_callbacks.objective import checkpoints
from lla_callbacks.objective.objective import Objective
from lla_callbacks.objective.state import preserved
from lla_callbacks.objective.twice_differentiable import twice_differentiable
from tests.kinds import (
    KINDS,
    Calling,
    Checkpointed,
    DetachedCube,
    Embedded,
    Kind,
    cross_entropy,
    dense_by_differences,
    tanh_net,
    tokens,
    vectors,
    with_linear,
)

EXACT = [kind for kind in KINDS if kind.derivative == "exact"]
REFUSED = [kind for kind in KINDS if kind.derivative == "none"]


def state_of(module: nn.Module) -> dict[str, Any]:
    tensors = [*module.parameters(), *module.buffers()]
    return {
        "values": {k: v.clone() for k, v in module.state_dict(keep_vars=False).items()},
        "places": [t.data_ptr() for t in tensors],
        "versions": [t._version for t in tensors],
        "gradients": [t.grad for t in tensors],
        "requires": [t.requires_grad for t in tensors],
        "modes": [m.training for m in module.modules()],
        "attributes": [sorted(m.__dict__) for m in module.modules()],
        "random": torch.get_rng_state().clone(),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return bool(a == b)


def built(kind: Kind) -> tuple[nn.Module, list[Any], Any]:
    if kind.name.startswith("GPT-2"):
        pytest.importorskip("transformers")
    return kind.build()


_DENSE: dict[str, Tensor] = {}


def dense_of(kind: Kind, module: nn.Module, batches: list[Any], loss: Any) -> Tensor:
    """Return the dense Hessian of what `built` returns first in a test, which two tests need."""
    if kind.name not in _DENSE:
        _DENSE[kind.name] = dense_by_differences(module, batches, loss, kind.mode)
    return _DENSE[kind.name]


@pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.name)
def test_its_hessian_is_the_dense_one_and_it_is_left_as_it_was(kind: Kind) -> None:
    module, batches, loss = built(kind)
    before = state_of(module)
    objective = Objective(module, batches, loss, mode=kind.mode)
    value = objective()
    operator = objective.hessian()
    found = operator.to_dense()
    after = state_of(module)
    assert [key for key in before if not same(before[key], after[key])] == []
    assert operator.loss == pytest.approx(value, rel=1e-6)
    dense = dense_of(kind, module, batches, loss)
    # Differences of step 1e-5 lose eps / 1e-5 to rounding and 1e-10 to third derivatives.
    size = max(1.0, float(dense.abs().max()))
    torch.testing.assert_close(found, dense, atol=2e-7 * size, rtol=0)
    torch.testing.assert_close(found, found.T, atol=1e-12 * size, rtol=0)


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.name)
def test_what_has_no_second_derivative_is_refused_and_left_as_it_was(kind: Kind) -> None:
    module, batches, loss = built(kind)
    before = state_of(module)
    with pytest.raises(NoSecondDerivativeError, match=kind.says):
        measure_hessian(module, batches, loss=loss, num_steps=2, num_probes=2, engine="exact")
    after = state_of(module)
    assert [key for key in before if not same(before[key], after[key])] == []


# Their kernels have first derivatives only in float32, or none of a distance to itself.
ROUGH = {"cdist"}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_differences_measure_every_kind_and_leave_it_as_it_was(kind: Kind) -> None:
    module, batches, loss = built(kind)
    before = state_of(module)
    operator = Objective(module, batches, loss, mode=kind.mode).hessian(engine="difference")
    source = torch.Generator().manual_seed(0)
    vector = torch.randn(operator.shape[0], generator=source).to(operator.dtype)
    product = operator @ vector
    off = operator.engine_error(vector, product)
    after = state_of(module)
    assert [key for key in before if not same(before[key], after[key])] == []
    dense = dense_of(kind, module, batches, loss)
    wanted = dense @ vector
    size = max(1e-3, float(wanted.norm()))
    if float(off.norm()) < 0.05 * size:
        assert float((product - wanted).norm()) < 2e-6 * size + 3 * float(off.norm())
    else:
        assert kind.name in ROUGH


def test_without_a_second_derivative_differences_take_over() -> None:
    kind = next(kind for kind in REFUSED if kind.name == "EmbeddingBag, sum")
    module, batches, loss = built(kind)
    report = measure_hessian(module, batches, loss=loss, num_steps=8, num_probes=8)
    assert report.engine == "difference"
    assert "EmbeddingBag" in report.engine_reason or "embedding_bag" in report.engine_reason
    assert report.gaps == {}
    dense = dense_by_differences(module, batches, loss, kind.mode)
    top = float(torch.linalg.eigvalsh(dense)[-1])
    assert float(report.lambda_max) == pytest.approx(top, abs=2 * report.lambda_max.residual)
    assert abs(report.trace - float(dense.trace())) < 5 * report.trace_sem + 1e-6


def test_the_names_tell_the_kinds_apart() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS)


# -- what the list cannot say -------------------------------------------------------------


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_spectral_norm_in_training_holds_the_vectors_of_its_next_step_still(
    norm: Callable[..., Any],
) -> None:
    module, batch = with_linear(norm)().double(), vectors()
    found = Objective(module, [batch], cross_entropy).hessian().to_dense()
    module.train()(batch[0])
    dense = dense_by_differences(module, [batch], cross_entropy, "eval")
    torch.testing.assert_close(found, dense, atol=1e-7, rtol=0)


def test_a_detached_derivative_is_not_seen_but_gradgradcheck_sees_it() -> None:
    module, batch = Calling(DetachedCube.apply).double(), vectors()
    found = Objective(module, [batch], cross_entropy).hessian().to_dense()
    dense = dense_by_differences(module, [batch], cross_entropy, "batch")
    assert (found - dense).abs().max() > 0.1
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradgradcheck(DetachedCube.apply, x)


def test_weights_that_a_forward_pass_clips_are_refused() -> None:
    module = Embedded(max_norm=0.5).double()
    before = state_of(module)
    with pytest.raises(MeasurementError, match="changes the trainable weights"):
        measure_hessian(module, [tokens()], loss=cross_entropy, num_steps=2, num_probes=2)
    assert same(state_of(module)["values"], before["values"])


def test_lazy_modules_are_measured_once_they_know_their_size() -> None:
    with pytest.raises(ValueError, match="dummy batch to initialize"):
        measure_hessian(nn.LazyLinear(3), [vectors()], loss=cross_entropy)


def test_complex_parameters_are_refused() -> None:
    module = nn.Linear(4, 3, dtype=torch.complex128)

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return module(batch[0].to(torch.complex128)).abs().mean()

    with pytest.raises(TypeError, match=r"complex128.*requires_grad=False"):
        measure_hessian(module, [vectors()], loss=loss)


class Watched(nn.Module):
    """Watches its own gradients in every way there is."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tanh_net()
        self.seen: list[str] = []
        self.handles = [
            self.net[1].register_full_backward_hook(lambda *_: self.seen.append("module")),
            self.net[2].register_full_backward_pre_hook(lambda *_: self.seen.append("before")),
            self.net[2].weight.register_hook(lambda g: self.seen.append("parameter")),
        ]

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        out.register_hook(lambda g: self.seen.append("tensor"))
        return out


def test_hooks_on_gradients_are_not_called_and_stay() -> None:
    module, batch = Watched().double(), vectors()
    cross_entropy(module, batch).backward()
    called = sorted(module.seen)
    assert called == ["before", "module", "parameter", "tensor"]
    measure_hessian(module, [batch, batch], loss=cross_entropy, num_steps=3, num_probes=2)
    assert sorted(module.seen) == called
    cross_entropy(module, batch).backward()
    assert sorted(module.seen) == sorted(2 * called)
    for handle in module.handles:
        handle.remove()
    cross_entropy(module, batch).backward()
    assert len(module.seen) == 9


class CountedInCheckpoint(nn.Module):
    """Batch norm and a counter inside a checkpoint, which computes them twice."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.first = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.calls = 0

    def inside(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inside, self.first(x), use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_leaves_no_trace(use_reentrant: bool) -> None:
    module, batch = CountedInCheckpoint(use_reentrant).double(), vectors()
    before = state_of(module)
    measure_hessian(module, [batch], loss=cross_entropy, num_steps=3, num_probes=2)
    assert same(before, state_of(module))
    assert module.calls == 0
    cross_entropy(module, batch).backward()
    # Outside they are what they were.
    assert module.calls == 2


def test_a_torch_whose_checkpoints_cannot_be_switched_off_is_told_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As if a release had renamed what the switch replaces.
    monkeypatch.setattr(checkpoints, "_GENERATORS", ())
    checkpoints._verify.cache_clear()
    module, batch = Checkpointed(use_reentrant=False).double(), vectors()
    objective = Objective(module, [batch], cross_entropy)
    with pytest.raises(NoSecondDerivativeError, match=r"cannot be switched off.*'difference'"):
        objective.hessian(engine="exact")
    report = measure_hessian(module, [batch], loss=cross_entropy, num_steps=3, num_probes=2)
    assert report.engine == "difference"
    assert "cannot be switched off" in report.engine_reason


def test_checkpoints_in_sequence_keep_their_activations_too() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.parts = nn.Sequential(nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint_sequential(self.parts, 2, self.first(x), use_reentrant=True)

    module, batch = Sequence().double(), vectors()
    found = Objective(module, [batch], cross_entropy).hessian().to_dense()
    dense = dense_by_differences(module, [batch], cross_entropy, "batch")
    torch.testing.assert_close(found, dense, atol=1e-7, rtol=0)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_slices_pass_checkpoints_without_a_word(use_reentrant: bool) -> None:
    module = Checkpointed(use_reentrant).double()
    line = loss_line(module, [vectors()], loss=cross_entropy, alphas=(-1.0, 0.0, 1.0))
    assert "loss" in repr(line)


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 2), (5,)])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_composed_weight_norm_has_torchs_values_and_right_second_derivatives(
    shape: tuple[int, ...], dim: int
) -> None:
    if dim >= len(shape):
        return
    v = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    g = torch.norm_except_dim(v, 2, dim).detach().mul(1.5).requires_grad_()

    def function(v: Tensor, g: Tensor) -> Tensor:
        with twice_differentiable(dropout=False):
            return torch._weight_norm(v, g, dim)

    torch.testing.assert_close(function(v, g), torch._weight_norm(v, g, dim))
    assert torch.autograd.gradgradcheck(function, (v, g))


def test_a_scripted_module_gets_its_buffers_back() -> None:
    module = torch.jit.script(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double())
    kept = {name: buffer.data_ptr() for name, buffer in module.named_buffers()}
    with preserved(module, seed=0):
        module(vectors()[0])
    assert {name: buffer.data_ptr() for name, buffer in module.named_buffers()} == kept
    assert int(dict(module.named_buffers())["1.num_batches_tracked"]) == 0

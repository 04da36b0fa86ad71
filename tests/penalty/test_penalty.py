"""Gradients of the trace penalty against exact ones, dense and written out, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lla_callbacks.linalg.errors import MeasurementError, NonFiniteError
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.penalty import adding, displacement, moving
from lla_callbacks.penalty import penalty as penalty_module
from lla_callbacks.penalty.displacement import DisplacedLoss
from lla_callbacks.penalty.penalty import PenaltyGradient, PenaltySettings, penalty_gradient

ESTIMATORS = ["perturbation", "difference", "gauss_newton", "exact"]


def normalized(x: Tensor, dim: int) -> Tensor:
    """Batch or layer normalization, written out."""
    mean = x.mean(dim, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(dim, keepdim=True) + 1e-5).sqrt()


@dataclass(frozen=True)
class Net:
    """A two-layer network as a module, and as a plain function of its flat parameters."""

    normalization: Callable[[], nn.Module]
    written_out: Callable[[Tensor, Tensor, Tensor], Tensor]
    affine: int

    def module(self) -> nn.Sequential:
        torch.manual_seed(1)
        net = nn.Sequential(
            nn.Linear(3, 4), self.normalization(), nn.Tanh(), nn.Linear(4, 3)
        ).double()
        for p in net.parameters():
            p.data += 0.3 * torch.randn_like(p)
        return net

    def outputs(self, flat: Tensor, x: Tensor) -> Tensor:
        sizes = [12, 4, *[4] * self.affine, 12, 3]
        w, b, *affine, v, c = torch.split(flat, sizes)
        hidden = x @ w.reshape(4, 3).T + b
        hidden = self.written_out(hidden, *affine) if affine else hidden
        return torch.tanh(hidden) @ v.reshape(3, 4).T + c


NETS = {
    "plain": Net(nn.Identity, lambda x: x, 0),  # type: ignore[arg-type, misc]
    "batch norm": Net(lambda: nn.BatchNorm1d(4), lambda x, g, b: normalized(x, 0) * g + b, 2),
    "layer norm": Net(lambda: nn.LayerNorm(4), lambda x, g, b: normalized(x, 1) * g + b, 2),
    "group norm": Net(lambda: nn.GroupNorm(1, 4), lambda x, g, b: normalized(x, 1) * g + b, 2),
}


def batch(size: int = 8) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(2)
    x = torch.randn(size, 3, dtype=torch.float64, generator=source)
    return x, torch.randint(0, 3, (size,), generator=source)


def around(
    module: nn.Module, evaluate: Callable[[], Tensor] | None = None, step: int = 0, **settings
) -> DisplacedLoss:
    x, y = batch()
    space = ParameterSpace(dict(module.named_parameters()))
    chosen = settings.pop("chosen", space.names)
    evaluate = evaluate or (lambda: F.cross_entropy(module(x), y))
    return DisplacedLoss(evaluate, space, chosen, key=(step,), **settings)


def penalty_of(
    loss: DisplacedLoss, strength: float, estimator: str, num_probes: int = 1, **settings
) -> PenaltyGradient:
    chosen = PenaltySettings(estimator, num_probes, loss.relative)  # type: ignore[arg-type]
    return penalty_gradient(
        loss, strength, chosen, **{"with_task": False, "compare": True, **settings}
    )


def unit(loss: DisplacedLoss, estimator: str, num_probes: int = 1, strength: float = 1e-6):
    """The penalty's flat gradient per unit of strength."""
    found = penalty_of(loss, strength, estimator, num_probes)
    return loss.space.flatten(found.gradient) / strength


def curvature(net: Net, estimator: str) -> Callable[[Tensor], Tensor]:
    """The dense matrix whose trace an estimator penalizes, of the function written out."""
    x, y = batch()
    if estimator != "gauss_newton":
        return torch.func.hessian(lambda flat: F.cross_entropy(net.outputs(flat, x), y))

    def gauss_newton(flat: Tensor) -> Tensor:
        outputs = net.outputs(flat, x)
        jacobian = torch.func.jacfwd(lambda f: net.outputs(f, x))(flat)
        p = outputs.softmax(1)
        inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        return torch.einsum("nci,ncd,ndj->ij", jacobian, inner, jacobian) / len(x)

    return gauss_newton


def third_derivative(net: Net, estimator: str, flat: Tensor) -> Tensor:
    """``T[i, j, k] = d A_ij / d theta_k``, dense."""
    return torch.func.jacfwd(curvature(net, estimator))(flat)


# Relative error of one probe at these steps: c^2 times higher derivatives, and rounding.
BIAS = {"perturbation": 1e-3, "difference": 1e-2, "gauss_newton": 1e-2, "exact": 1e-9}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", NETS)
def test_mean_and_variance_are_those_known(name: str, estimator: str) -> None:
    net = NETS[name]
    module = net.module()
    flat = nn.utils.parameters_to_vector(module.parameters()).detach()
    tensor = third_derivative(net, estimator, flat)
    truth = torch.einsum("iik->k", tensor)
    diagonal = torch.diagonal(tensor, dim1=0, dim2=1)
    variance = 2 * (tensor.square().sum((0, 1)) - diagonal.square().sum(1))
    count = 200
    samples = torch.stack([unit(around(module, step=i), estimator) for i in range(count)])
    error = (samples.mean(0) - truth).abs()
    bias = BIAS[estimator] * truth.norm()
    assert (error <= 5 * (variance / count).sqrt() + bias).all()
    squares = (samples - truth).square().sum(1)
    sem = squares.std() / math.sqrt(count)
    assert abs(float(squares.mean() - variance.sum())) <= 5 * sem + 3 * bias * variance.sum().sqrt()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("relative", [False, True], ids=["plain", "relative"])
@pytest.mark.parametrize("name", NETS)
def test_gradient_is_that_of_the_quadratic_form(
    monkeypatch, name: str, relative: bool, estimator: str
) -> None:
    """One probe, known exactly: its value and its gradient, also through the weights' sizes."""
    # Steps of 1e-4 keep the bias small and rounding smaller.
    monkeypatch.setattr(penalty_module, "STEP", 3e-4)
    net = NETS[name]
    module = net.module()
    loss = around(module, relative=relative)
    flat = nn.utils.parameters_to_vector(module.parameters()).detach()
    probe = torch.cat([z.reshape(-1).double() for z in loss.signs(0)])
    matrix = curvature(net, estimator)

    def form(flat: Tensor) -> Tensor:
        sizes = [len(w.reshape(-1)) for w in module.parameters()]
        scales = [w.square().mean().sqrt() for w in torch.split(flat, sizes)]
        repeated = torch.cat([s.expand(n) for s, n in zip(scales, sizes, strict=True)])
        v = probe * repeated if relative else probe
        return v @ matrix(flat) @ v

    truth = torch.func.jacfwd(form)(flat)
    strength = 0.5e-8
    found = penalty_of(loss, strength, estimator)
    error = (loss.space.flatten(found.gradient) / strength - truth).norm() / truth.norm()
    assert error < 1e-4
    assert found.comparison is not None
    value = found.comparison.penalty / strength
    assert value == pytest.approx(float(form(flat)), rel=1e-3, abs=1e-4)


def differentiates_thrice(form: Tensor, parameters: list[nn.Parameter]) -> bool:
    """Return False where torch says that it does not, as from 2.14 on for batch norm."""
    try:
        torch.autograd.grad(form, parameters, retain_graph=True)
    except RuntimeError as error:
        if "3rd+ order" not in str(error):
            raise
        return False
    return True


@pytest.mark.parametrize("name", ["batch norm", "layer norm"])
def test_native_normalization_would_be_wrong_in_third_order(name: str) -> None:
    """Why the exact estimator substitutes elementary forms, and refuses what it cannot."""
    module = NETS[name].module()
    x, y = batch()
    loss = around(module)
    parameters = list(module.parameters())
    vectors = [z.double() for z in loss.signs(0)]
    first = torch.autograd.grad(F.cross_entropy(module(x), y), parameters, create_graph=True)
    second = torch.autograd.grad(first, parameters, vectors, create_graph=True)
    form = sum((h * v).sum() for h, v in zip(second, vectors, strict=True))
    if not differentiates_thrice(form, parameters):
        # From torch 2.14 on batch norm refuses what it got wrong.
        return
    native = nn.utils.parameters_to_vector(torch.autograd.grad(form, parameters))
    exact = unit(loss, "exact")
    assert (native - exact).norm() > 0.1 * exact.norm()


def test_exact_refuses_a_normalization_that_cannot_be_substituted() -> None:
    module = NETS["plain"].module()
    x, y = batch()

    def evaluate() -> Tensor:
        hidden = torch.native_layer_norm(module[0](x), [4], None, None, 1e-5)[0]
        return F.cross_entropy(module[3](hidden), y)

    with pytest.raises(MeasurementError, match=r"NativeLayerNormBackward0 is wrong.*perturbation"):
        unit(around(module, evaluate), "exact")
    assert unit(around(module, evaluate), "perturbation").isfinite().all()


def test_difference_at_the_step_of_perturbation_is_perturbation(monkeypatch) -> None:
    module = NETS["batch norm"].module()
    loss, strength = around(module, relative=True), 1e-3
    monkeypatch.setattr(penalty_module, "STEP", math.sqrt(2 * strength))
    one, other = (unit(loss, e, 3, strength) for e in ("perturbation", "difference"))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("estimator", "order"), [("perturbation", 1), ("difference", 2)])
def test_bias_has_the_known_order(monkeypatch, estimator: str, order: int) -> None:
    """Relative bias grows with the strength, and with the squared step."""
    module = NETS["plain"].module()
    exact = unit(around(module), "exact", 2)
    errors = []
    for scale in (1.0, 2.0):
        monkeypatch.setattr(penalty_module, "STEP", 0.02 * scale)
        found = unit(around(module), estimator, 2, strength=1e-4 * scale)
        errors.append(float((found - exact).norm()))
    assert errors[1] / errors[0] == pytest.approx(2**order, rel=0.02)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_probes_are_averaged(monkeypatch, estimator: str) -> None:
    module = NETS["layer norm"].module()
    together = unit(around(module), estimator, 3, 1e-4)

    single = []
    for number in range(3):
        loss = around(module)
        monkeypatch.setattr(loss, "signs", lambda _, n=number, loss=loss: type(loss).signs(loss, n))
        monkeypatch.setattr(
            loss, "move", lambda c, _, n=number, loss=loss: type(loss).move(loss, c, n)
        )
        single.append(unit(loss, estimator, 1, 1e-4))
    torch.testing.assert_close(together, torch.stack(single).mean(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_only_chosen_parameters_are_moved(estimator: str) -> None:
    """The trace of one layer's block; its gradient reaches every parameter."""
    net = NETS["plain"]
    module = net.module()
    flat = nn.utils.parameters_to_vector(module.parameters()).detach()
    tensor = third_derivative(net, estimator, flat)[:12, :12]
    z = next(around(module).signs(0)).reshape(-1).double()
    truth = torch.einsum("i,ijk,j->k", z, tensor, z)
    found = unit(around(module, chosen=["0.weight"]), estimator, strength=0.5e-8)
    assert (found - truth).norm() < 2e-3 * truth.norm()
    assert truth[16:].norm() > 0.1 * truth.norm()


def test_plain_trace_falls_when_weights_before_a_norm_grow() -> None:
    """``<w, d tr> = -2 tr`` of a layer before batch norm; relative, the product is zero."""
    module = NETS["batch norm"].module()
    module[1].eps = 1e-14  # type: ignore[assignment]
    for relative in (False, True):
        loss = around(module, chosen=["0.weight", "0.bias"], relative=relative)
        found = penalty_of(loss, 1.0, "exact")
        w, b = module[0].weight.detach(), module[0].bias.detach()
        gradients = found.gradient[:2]
        assert gradients[0] is not None
        assert gradients[1] is not None
        along = float((gradients[0] * w).sum() + (gradients[1] * b).sum())
        assert found.comparison is not None
        expected = 0.0 if relative else -2 * found.comparison.penalty
        assert along == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_relative_penalty_never_pushes_along_scale_free_weights(estimator: str) -> None:
    """Exactly, not to the order of the step: the displaced loss itself is scale-free."""
    torch.manual_seed(4)
    module = nn.Sequential(
        nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4, eps=1e-14), nn.Tanh(), nn.Linear(4, 3)
    ).double()
    found = penalty_of(around(module, relative=True), 1e-2, estimator)
    gradient = found.gradient[0]
    assert gradient is not None
    w = module[0].weight.detach()
    assert abs(float((gradient * w).sum())) < 1e-7 * float(gradient.norm() * w.norm())


def test_tensor_of_zeros_is_not_moved_by_a_relative_penalty() -> None:
    module = NETS["plain"].module()
    nn.init.zeros_(module[0].bias)
    for estimator in ESTIMATORS:
        assert unit(around(module, relative=True), estimator).isfinite().all()


def relu_net() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)
    ).double()


@pytest.mark.parametrize("layer", ["0", "2", "4"])
def test_blocks_of_relu_networks_are_gauss_newton(monkeypatch, layer: str) -> None:
    # So short that no kink lies within the step.
    monkeypatch.setattr(penalty_module, "STEP", 1e-6)
    module = relu_net()
    chosen = [f"{layer}.weight", f"{layer}.bias"]
    values = []
    for estimator in ("exact", "gauss_newton"):
        found = penalty_of(around(module, chosen=chosen), 1.0, estimator, 4)
        assert found.comparison is not None
        values.append(found.comparison.penalty)
    # Between kinks the outputs are linear in one layer's weights.
    assert values[0] == pytest.approx(values[1], rel=1e-6)


@pytest.mark.parametrize("far", [100.0, -100.0])
def test_gauss_newton_is_positive_and_the_trace_need_not_be(far: float) -> None:
    """Large residuals of one sign: the second part dominates, and one of the signs is negative."""
    module = NETS["plain"].module()

    def evaluate() -> Tensor:
        return F.mse_loss(module(X), torch.full_like(X, far))

    values = {}
    for estimator in ("exact", "gauss_newton"):
        probes = [penalty_of(around(module, evaluate, i), 1.0, estimator) for i in range(20)]
        values[estimator] = [p.comparison.penalty for p in probes if p.comparison]
    assert sum(values["exact"]) * far > 0
    assert min(values["gauss_newton"]) > 0


X, Y = batch()
CRITERIA: dict[str, tuple[Callable[[nn.Module], Tensor], Callable[[nn.Module], Tensor]]] = {
    "nll": (
        lambda m: F.nll_loss(F.log_softmax(m(X), 1), Y),
        lambda m: F.cross_entropy(m(X), Y),
    ),
    "module": (
        lambda m: nn.CrossEntropyLoss()(m(X), Y),
        lambda m: F.cross_entropy(input=m(X), target=Y),
    ),
    "weight": (
        lambda m: 0.5 * F.cross_entropy(m(X), Y) + 3.0 * m[0].weight.square().sum(),
        lambda m: F.cross_entropy(m(X), Y) / 2,
    ),
    "samples": (
        lambda m: (F.cross_entropy(m(X), Y, reduction="none") * torch.arange(8)).mean(),
        lambda m: sum(F.cross_entropy(m(X[i : i + 1]), Y[i : i + 1]) * i / 8 for i in range(8)),  # type: ignore[return-value]
    ),
    "two": (
        lambda m: F.mse_loss(m(X), X) + F.cross_entropy(m(X), Y),
        lambda m: (m(X) - X).square().mean() * 0 + F.mse_loss(m(X), X) + F.cross_entropy(m(X), Y),
    ),
    "for show": (
        lambda m: shown(m) + F.cross_entropy(m(X), Y),
        lambda m: F.cross_entropy(m(X), Y),
    ),
}


def shown(module: nn.Module) -> float:
    with torch.no_grad():
        return 0.0 * float(F.mse_loss(module(X), X))


@pytest.mark.parametrize("name", CRITERIA)
def test_gauss_newton_sees_every_form_of_a_criterion(name: str) -> None:
    module = NETS["plain"].module()
    one, other = (
        unit(around(module, lambda f=f: f(module)), "gauss_newton")  # type: ignore[misc]
        for f in CRITERIA[name]
    )
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    assert one.norm() > 0.1


@pytest.mark.parametrize(
    "halved",
    [
        lambda m: 0.5 * F.cross_entropy(m(X), Y) + 3.0 * m[0].weight.square().sum(),
        lambda m: (F.cross_entropy(m(X), Y, reduction="none") * 0.5).mean(),
    ],
    ids=["whole", "by sample"],
)
def test_criteria_count_with_their_weight_in_the_loss(halved: Callable[..., Tensor]) -> None:
    module = NETS["plain"].module()
    whole = unit(around(module), "gauss_newton")
    found = unit(around(module, lambda: halved(module)), "gauss_newton")
    torch.testing.assert_close(found, whole / 2, rtol=1e-6, atol=1e-8)


def test_gauss_newton_refuses_an_unknown_criterion() -> None:
    module = NETS["plain"].module()
    loss = around(module, lambda: module(X).square().sum())
    with pytest.raises(MeasurementError, match=r"no criterion.*cross_entropy"):
        unit(loss, "gauss_newton")


def test_gauss_newton_sees_through_a_compiled_module() -> None:
    module = NETS["plain"].module()
    compiled = torch.compile(lambda: F.cross_entropy(module(X), Y), backend="eager")
    expected = unit(around(module), "gauss_newton")
    torch.testing.assert_close(unit(around(module, compiled), "gauss_newton"), expected)


def test_fused_attention_and_recurrence_take_first_order_estimators() -> None:
    torch.manual_seed(6)
    attention = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).double()
    recurrent = nn.LSTM(4, 4, batch_first=True).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64)

    def evaluate() -> Tensor:
        return F.mse_loss(recurrent(attention(x))[0], x)

    module = nn.ModuleList([attention, recurrent])
    found = {e: unit(around(module, evaluate), e, strength=0.5e-8) for e in ESTIMATORS}
    assert (found["perturbation"] - found["exact"]).norm() < 0.02 * found["exact"].norm()


@pytest.mark.parametrize("with_task", [False, True])
def test_limit_on_the_ratio(with_task: bool) -> None:
    module = NETS["plain"].module()
    loss = around(module)
    free = penalty_of(loss, 1.0, "difference")
    assert free.comparison is not None
    limit = free.comparison.ratio / 4
    limited = penalty_of(loss, 1.0, "difference", max_ratio=limit, with_task=with_task)
    assert limited.comparison is not None
    assert limited.comparison.factor == pytest.approx(0.25)
    assert limited.comparison.ratio == pytest.approx(limit)
    assert limited.comparison.penalty == pytest.approx(free.comparison.penalty / 4)
    expected = loss.space.flatten(free.gradient) / 4
    if with_task:
        x, y = batch()
        gradients = torch.autograd.grad(F.cross_entropy(module(x), y), loss.space.tensors)
        expected = expected + loss.space.flatten(gradients)
    torch.testing.assert_close(loss.space.flatten(limited.gradient), expected)
    # A limit that does not bind leaves every bit.
    far = penalty_of(loss, 1.0, "difference", max_ratio=1e9)
    assert torch.equal(loss.space.flatten(far.gradient), loss.space.flatten(free.gradient))


@pytest.mark.parametrize("estimator", ["perturbation", "difference"])
def test_comparison_does_not_change_the_gradient(estimator: str) -> None:
    loss = around(NETS["batch norm"].module())
    one, other = (
        penalty_of(loss, 1e-3, estimator, with_task=True, compare=compare)
        for compare in (True, False)
    )
    assert one.contains_task
    assert other.contains_task
    assert torch.equal(loss.space.flatten(one.gradient), loss.space.flatten(other.gradient))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("at", [1, 2])
def test_weights_come_back_to_the_bit(estimator: str, at: int) -> None:
    module = NETS["batch norm"].module().float()
    before = [p.detach().clone() for p in module.parameters()]
    x, y = batch()
    calls = []

    def evaluate() -> Tensor:
        calls.append(1)
        if len(calls) == at:
            raise RuntimeError("the loss raises here")
        return F.cross_entropy(module(x.float()), y)

    if estimator == "exact" and at == 2:
        # One forward pass serves exact derivatives.
        penalty_of(around(module, evaluate), 1e-3, estimator, compare=False)
    else:
        with pytest.raises(RuntimeError, match="raises here"):
            penalty_of(around(module, evaluate), 1e-3, estimator)
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_is_not_finite_is_an_error(estimator: str) -> None:
    module = NETS["plain"].module()
    x, y = batch()
    loss = around(module, lambda: F.cross_entropy(module(x), y) * math.inf)
    with pytest.raises(NonFiniteError, match=r"not finite|has norm (nan|inf)"):
        penalty_of(loss, 1e-3, estimator, compare=False)


def test_unused_parameters_have_no_gradient() -> None:
    module = nn.ModuleDict({"used": nn.Linear(3, 3), "unused": nn.Linear(2, 2)}).double()
    for estimator in ESTIMATORS:
        loss = around(module, lambda: F.cross_entropy(module["used"](X), Y))
        found = penalty_of(loss, 1e-3, estimator, compare=False)
        assert [g is None for g in found.gradient] == [False, False, True, True]


class Kept(torch.autograd.Function):
    """A gradient that somebody goes on holding."""

    held = torch.arange(12.0, dtype=torch.float64).view(4, 3)

    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        return weight.sum() * 0

    @staticmethod
    def backward(ctx, _: Tensor) -> Tensor:
        return Kept.held


# Of two weights (4, 3): gradients that are one expanded number, one tensor for both, two views
# of it, somebody else's, and ordinary ones, each its own.
X_SHARED = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
SHARING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "expanded": lambda a, b: a.sum() + 2 * b.sum(),
    "one": lambda a, b: ((a + b) * X_SHARED).sum(),
    "views": lambda a, b: ((a.t() + b.view(12).view(4, 3).t()) * X_SHARED.t()).sum(),
    "held": lambda a, b: Kept.apply(a) + b.sum(),
    "own": lambda a, b: F.linear(X_SHARED, a).sum() + F.linear(X_SHARED, b).tanh().sum(),
}


@pytest.mark.parametrize("few", [0, 2**20], ids=["large", "small"])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("kind", SHARING)
def test_gradients_that_share_their_memory_are_added_rightly(
    monkeypatch, kind: str, scale: float, few: int
) -> None:
    """Those that nobody else sees are taken over and added to in place, and no others."""
    monkeypatch.setattr(displacement, "FEW", few)
    monkeypatch.setattr(displacement, "LARGE", 0)
    copied: list[Tensor] = []
    multiplied = torch._foreach_mul
    monkeypatch.setattr(
        torch, "_foreach_mul", lambda found, by: copied.extend(found) or multiplied(found, by)
    )
    source = torch.Generator().manual_seed(3)
    made = [torch.randn(4, 3, dtype=torch.float64, generator=source) for _ in range(2)]
    module = nn.ParameterList(nn.Parameter(m) for m in made)
    loss = around(module, lambda: SHARING[kind](*module), loss_scale=scale)
    z = next(loss.signs(0)).double(), list(loss.signs(0))[1].double()
    expected = torch.zeros(24, dtype=torch.float64)
    for c in (0.1, -0.1):
        moved = [(w + c * s).requires_grad_() for w, s in zip(made, z, strict=True)]
        gradients = torch.autograd.grad(SHARING[kind](*moved), moved)
        if kind == "held":
            gradients = (Kept.held / scale, gradients[1])
        expected += torch.cat([g.reshape(-1) for g in gradients]) / 2
    if kind == "held" and scale == 1.0:
        # This gradient ignores what the loss is multiplied by.
        expected[:12] *= 2
    found = penalty_of(loss, 0.005, "perturbation", with_task=True, compare=False)
    torch.testing.assert_close(loss.space.flatten(found.gradient), expected)
    assert torch.equal(Kept.held, torch.arange(12.0, dtype=torch.float64).view(4, 3))
    if scale == 1.0 and displacement.has_memory_alone(torch.ones(1)):
        assert bool(copied) == (kind != "own")


@pytest.mark.parametrize("relative", [False, True])
def test_large_weights_are_moved_in_pieces_as_whole_ones_are(monkeypatch, relative: bool) -> None:
    module = nn.Linear(37, 11)
    kept = [p.detach().clone() for p in module.parameters()]
    for group, piece in ((2**20, 2**17), (1, 24)):
        monkeypatch.setattr(displacement, "GROUP_SIZE", group)
        monkeypatch.setattr(moving, "PIECE", piece)
        loss = around(module, relative=relative)
        z = list(loss.signs(1))
        with loss.displacing():
            for distance in (0.1, -0.1, 0.2):
                loss.move(distance, 1)
                for p, w, s in zip(module.parameters(), kept, z, strict=True):
                    size = w.square().mean().sqrt() if relative else 1.0
                    torch.testing.assert_close(p.detach(), w + distance * size * s)


@pytest.mark.parametrize("writes", [False, True])
def test_both_sides_are_as_far_from_the_weights_whoever_writes_them(monkeypatch, writes) -> None:
    """The second is the mirror image of the first, or drawn anew where a step has changed it."""
    monkeypatch.setattr(displacement, "GROUP_SIZE", 1)
    module, seen = nn.Linear(37, 11), []
    kept = [p.detach().clone() for p in module.parameters()]

    def evaluate() -> Tensor:
        seen.append([p.detach().clone() for p in module.parameters()])
        if writes:
            module.weight.data.clamp_(-0.05, 0.05)
        return module(torch.ones(2, 37)).square().sum()

    drawn: list[float] = []
    write = moving.Mover.write
    monkeypatch.setattr(
        moving.Mover, "write", lambda self, *args: drawn.append(1) or write(self, *args)
    )
    loss = around(module, evaluate)
    z = list(loss.signs(0))
    for _ in range(2):
        penalty_of(loss, 0.005, "perturbation", with_task=True, compare=False)
    for found, distance in zip(seen, [0.1, -0.1] * 2, strict=True):
        for p, w, s in zip(found, kept, z, strict=True):
            torch.testing.assert_close(p, w + distance * s, rtol=1e-6, atol=1e-7)
    if displacement.has_memory_alone(torch.ones(1)):
        assert len(drawn) == (6 if writes else 4)
    assert all(torch.equal(p, w) for p, w in zip(module.parameters(), kept, strict=True))


@pytest.mark.parametrize("at", [None, 0, -1])
@pytest.mark.parametrize("side", [0, 1])
def test_gradients_that_are_added_in_pieces_are_looked_at_whole(monkeypatch, at, side) -> None:
    monkeypatch.setattr(displacement, "FEW", 0)
    monkeypatch.setattr(adding, "PIECE", 24)
    module, calls = nn.Linear(37, 11), []
    x = torch.linspace(-1, 1, 74).view(2, 37)

    def evaluate() -> Tensor:
        calls.append(1)
        factors = torch.ones(11, 37)
        if at is not None and len(calls) == 1 + side:
            factors.view(-1)[at] = math.nan
        return (F.linear(x, module.weight * factors, module.bias).tanh()).sum()

    loss = around(module, evaluate)
    if at is not None:
        with pytest.raises(NonFiniteError, match="norm nan"):
            penalty_of(loss, 0.005, "perturbation", with_task=True, compare=False)
        return
    found = penalty_of(loss, 0.005, "perturbation", with_task=True, compare=False).gradient
    assert loss.squares.keys() == {0, 1}
    for g, (_, square) in zip(found, sorted(loss.squares.items()), strict=True):
        torch.testing.assert_close(square, g.square().sum(dtype=torch.float64), rtol=1e-5, atol=0)
    assert torch.equal(
        torch.cat([g.view(-1) for g in found]),
        loss.space.flatten(penalty_of(loss, 0.005, "perturbation", with_task=True).gradient),
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "hutchinson"}, "estimator is 'hutchinson'; give one of perturbation"),
        ({"num_probes": 0}, "num_probes is 0"),
        ({"num_probes": True}, "num_probes is True"),
        ({"relative": 1}, "relative is 1"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PenaltySettings(**settings)  # type: ignore[arg-type]

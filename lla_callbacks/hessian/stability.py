"""How far an optimizer is from its stability limit: 1 is the edge of stability."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lla_callbacks.hessian.engine_error import BOUND
from lla_callbacks.hessian.settings import HessianSettings
from lla_callbacks.linalg.distributed import part_like
from lla_callbacks.linalg.eigenvalue import Eigenvalue, end_of
from lla_callbacks.linalg.lanczos import lanczos
from lla_callbacks.linalg.loss_operator import LossOperator
from lla_callbacks.linalg.operators import ScaledOperator
from lla_callbacks.linalg.probes import generator
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.objective.precision import original_of

# Relative residual at which the preconditioned Lanczos run of Adam's stability stops, its value in
# its place for a while. At 0.05 and by the residual alone it took 5 to 11 products on a ResNet-20,
# and up to 8 of 100 runs stopped at another eigenvalue than the largest; so it takes three to five
# more (docs/benchmarks/coverage.md).
STABILITY_RTOL = 0.02


@dataclass(frozen=True)
class StabilityLimit:
    """What turns curvature into a stability ratio, for an optimizer at one moment.

    On a quadratic loss with Hessian ``H`` the optimizer diverges along some direction as
    soon as ``lambda_max(D^(1/2) (H + shift) D^(1/2)) > 1``. Along the way to the limit the
    ratio is that eigenvalue.

    Attributes:
        diagonal: ``D``, held as the parameters are.
        shift: Weight decay that acts through the gradient, likewise.
        uniform: The one value of each where they are constant: then the ratio follows from
            lambda_max.
    """

    diagonal: Tensor
    shift: Tensor
    uniform: tuple[float, float] | None

    @property
    def is_uniform(self) -> bool:
        """Whether ``D`` and the shift are constant."""
        return self.uniform is not None

    @property
    def rate(self) -> float:
        """The one value of ``D`` where it is constant."""
        assert self.uniform is not None
        return self.uniform[0]

    def ratio(self, lambda_max: float) -> float:
        """Return the ratio for a uniform limit."""
        assert self.uniform is not None
        return self.uniform[0] * (lambda_max + self.uniform[1])


def stability_limit(
    optimizer: torch.optim.Optimizer, space: ParameterSpace
) -> StabilityLimit | None:
    """Return the stability limit of an optimizer, or None where none is known.

    * SGD: ``D = lr (1 - dampening) / (2 (1 + momentum))`` (heavy ball), or
      ``lr (1 + 2 momentum) / (2 (1 + momentum))`` (Nesterov); for plain SGD the ratio is
      ``lambda_max lr / 2`` (Cohen et al. 2021, appendix B). Weight decay adds to ``H``.
    * Adam and AdamW: ``D = lr (1 - beta1) / ((1 + beta1) 2) / P`` with
      ``P = (sqrt(v / (1 - beta2^t)) + eps) (1 - beta1^t)``: for beta1 = 0.9 the limit is
      the published ``lambda_max(P^-1 H) = 38 / lr`` (Cohen et al. 2022, equation 4).
      Adam's weight decay adds to ``H``; AdamW's decoupled decay ``d`` turns the 2 into
      ``2 - lr d``. Before the first step ``v`` does not exist and there is no limit.
    * RMSprop (without momentum): ``D = lr / (2 (sqrt(v) + eps))``, ``v`` centred if asked.

    Parameters that the optimizer does not hold stay where they are: ``D = 0``. Where all do, at a
    learning rate of zero, there is no limit either.

    Args:
        optimizer: The optimizer, with its present state.
        space: Layout of the flat vectors.
    """
    diagonal = torch.zeros(space.length, dtype=torch.float64, device=space.device)
    shift = torch.zeros_like(diagonal)
    names = {id(original_of(t)): n for n, t in zip(space.names, space.tensors, strict=True)}
    where = {key: space.slices[name] for key, name in names.items()}
    for group in optimizer.param_groups:
        sign = -1.0 if group.get("maximize") else 1.0
        for parameter in group["params"]:
            index = where.get(id(parameter))
            if index is None:
                continue
            state = optimizer.state.get(parameter, {})
            entry = _entry(optimizer, group, state)
            if entry is None or sign < 0:
                return None
            value, decay = entry
            if isinstance(value, Tensor):
                like = space.tensors[space.names.index(names[id(parameter)])]
                value = part_like(value, like).reshape(-1)
            diagonal[index] = value
            shift[index] = decay
    vectors = space.vectors()
    ends = vectors.extent(diagonal), vectors.extent(shift)
    if not ends[0][1] > 0:
        # At a rate of zero (warm-up, the end of a decay) nothing moves, and no step can overshoot.
        return None
    uniform = all(low == high for low, high in ends)
    return StabilityLimit(diagonal, shift, (ends[0][0], ends[1][0]) if uniform else None)


def _entry(
    optimizer: torch.optim.Optimizer, group: dict[str, object], state: dict[str, object]
) -> tuple[Tensor | float, float] | None:
    """Return ``(D, shift)`` of one parameter, or None where it is not known."""
    needed = {
        torch.optim.SGD: ("momentum", "dampening", "nesterov"),
        torch.optim.Adam: ("betas", "eps", "amsgrad"),
        torch.optim.AdamW: ("betas", "eps", "amsgrad"),
        torch.optim.RMSprop: ("momentum", "centered", "eps"),
    }
    # A subclass may do without the settings that its parent's rule needs.
    keys = [key for kind, names in needed.items() if isinstance(optimizer, kind) for key in names]
    if group.get("lr") is None or any(key not in group for key in keys):
        return None
    lr, decay = _number(group["lr"]), _number(group.get("weight_decay") or 0.0)
    if isinstance(optimizer, torch.optim.SGD):
        beta, dampening = _number(group["momentum"]), _number(group["dampening"])
        if beta == 0:
            return lr / 2, decay
        factor = 1 + 2 * beta if group["nesterov"] else 1 - dampening
        return lr * factor / (2 * (1 + beta)), decay
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        moment = "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"
        if "step" not in state or moment not in state:
            return None
        beta1, beta2 = (_number(b) for b in group["betas"])  # type: ignore[attr-defined]
        step = _number(state["step"])
        second = state[moment]
        assert isinstance(second, Tensor)
        root = (second.double() / (1 - beta2**step)).sqrt()
        preconditioner = (root + _number(group["eps"])) * (1 - beta1**step)
        decoupled = isinstance(optimizer, torch.optim.AdamW) or bool(
            group.get("decoupled_weight_decay")
        )
        limit = 2 - lr * decay if decoupled else 2.0
        diagonal = lr * (1 - beta1) / ((1 + beta1) * limit) / preconditioner
        return diagonal, 0.0 if decoupled else decay
    if isinstance(optimizer, torch.optim.RMSprop):
        if "square_avg" not in state or _number(group["momentum"]) > 0:
            return None
        second = state["square_avg"]
        assert isinstance(second, Tensor)
        variance = second.double()
        if group["centered"]:
            mean = state["grad_avg"]
            assert isinstance(mean, Tensor)
            variance = variance - mean.double() ** 2
        return lr / (2 * (variance.sqrt() + _number(group["eps"]))), decay
    return None


def _number(value: object) -> float:
    return float(value)  # type: ignore[arg-type]


def measured_stability(
    hessian: LossOperator,
    limit: StabilityLimit | None,
    lambda_max: Eigenvalue,
    settings: HessianSettings,
) -> Eigenvalue:
    """Return the optimizer's stability ratio: from lambda_max, or by a run of its own."""
    if limit is None:
        return Eigenvalue(math.nan, math.nan)
    if limit.is_uniform:
        scale = limit.rate
        return Eigenvalue(limit.ratio(lambda_max), scale * lambda_max.beyond)
    diagonal, shift = hessian.vectors.cut(limit.diagonal), hessian.vectors.cut(limit.shift)
    operator = ScaledOperator(hessian, diagonal, shift)
    start = hessian.rademacher(generator(settings.seed, 1))
    # Parameters that the optimizer leaves alone are no part of its spectrum: of a start vector
    # that is mostly theirs, a run sees little but the eigenvalue zero.
    start = start * (diagonal.to(hessian.device) > 0)
    run = lanczos(
        operator,
        start,
        settings.num_steps,
        rtol=STABILITY_RTOL,
        which=[-1],
        basis_device=hessian.basis_device(settings.num_steps),
        half=hessian.keeps_half(settings.num_steps),
        noise=1.0,
    )
    end = end_of(run, -1, STABILITY_RTOL if run.num_steps < settings.num_steps else 0.0)
    found = Eigenvalue(float(end), end.beyond)
    if hessian.engine == "exact":
        return found
    # Along D^(1/2) u, where u is the top Ritz vector of D^(1/2) (H + shift) D^(1/2).
    root = diagonal.to(hessian.device, hessian.dtype).sqrt()
    vector = root * run.vectors([run.num_steps - 1])[:, 0].to(hessian.device)
    off = hessian.vectors.norm(root * hessian.engine_error(vector, hessian @ vector))
    if not off <= BOUND * abs(found):
        return Eigenvalue(math.nan, math.nan)
    return Eigenvalue(float(found), found.residual + off)

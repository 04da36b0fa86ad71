"""Exact gradients of ``z'Hz`` by third-order autodiff, where torch gets them right."""

from __future__ import annotations

import torch
from torch import Tensor

from lla_callbacks.linalg.errors import MeasurementError
from lla_callbacks.linalg.hessian import explaining_missing_derivative, refuse_dead_ends
from lla_callbacks.linalg.lost_graphs import refusing_lost_graphs
from lla_callbacks.objective.gradient_hooks import unwatched
from lla_callbacks.objective.twice_differentiable import twice_differentiable
from lla_callbacks.penalty.displacement import DisplacedLoss, Gradients

# Nodes whose second backward pass takes saved statistics for constants, so that a third
# derivative is wrong without a word (pytorch issues 186256 and 175754; measured on 2.13:
# 20 to 60 % off). The elementary forms replace them wherever a module calls torch.nn.functional.
WRONG_THIRD_DERIVATIVE = (
    "NativeBatchNormBackward0",
    "CudnnBatchNormBackward0",
    "MiopenBatchNormBackward0",
    "NativeLayerNormBackward0",
    "SyncBatchNormBackward",
)


def quadratic_form_gradient(loss: DisplacedLoss, num_probes: int) -> list[tuple[float, Gradients]]:
    """Return ``v'Hv`` and its gradient for each probe, with ``v = s z`` of the displacement.

    The unbiased one: ``E v'Hv = tr(S H_chosen S)``, and with ``relative`` the gradient goes
    through ``S`` too. Dropout keeps its mask. Derivatives are taken towards the chosen
    parameters only, save the last one.

    Raises:
        MeasurementError: If the loss contains an operation whose third derivative is known
            to be wrong.
        NoSecondDerivativeError: If one has no second derivative.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        twice_differentiable(dropout=True),
        explaining_missing_derivative(),
    ):
        loss.move(0.0, 0)
        value = loss.evaluate()
        _refuse_wrong_nodes(value)
        with unwatched(loss.space.tensors):
            with refusing_lost_graphs(value):
                gradients = torch.autograd.grad(
                    value, loss.weights, create_graph=True, allow_unused=True
                )
            refuse_dead_ends(gradients)
            return [_one_probe(loss, gradients, probe) for probe in range(num_probes)]


def _one_probe(
    loss: DisplacedLoss, gradients: tuple[Tensor | None, ...], probe: int
) -> tuple[float, Gradients]:
    pairs = zip(loss.signs(probe), loss.weights, strict=True)
    vectors = [z * _size(w) if loss.relative else z.to(w.dtype) for z, w in pairs]
    # A gradient without a graph is constant in the parameters: its rows are zero.
    known = [(g, v) for g, v in zip(gradients, vectors, strict=True) if g is not None]
    known = [(g, v) for g, v in known if g.requires_grad]
    if not known:
        return 0.0, (None,) * len(loss.space.tensors)
    products = torch.autograd.grad(
        [g for g, _ in known],
        loss.weights,
        [v for _, v in known],
        create_graph=True,
        allow_unused=True,
    )
    terms = [(h * v).sum() for h, v in zip(products, vectors, strict=True) if h is not None]
    form = torch.stack(terms).sum()
    if not form.requires_grad:
        return float(form), (None,) * len(loss.space.tensors)
    found = torch.autograd.grad(form, loss.space.tensors, retain_graph=True, allow_unused=True)
    return float(form.detach()), found


def _size(w: Tensor) -> Tensor:
    """Return the root mean square, differentiable; a tensor of zeros has no direction."""
    return w.square().mean().sqrt() if bool(w.any()) else w.new_zeros(())


def _refuse_wrong_nodes(value: Tensor) -> None:
    waiting = [value.grad_fn]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if node.name() in WRONG_THIRD_DERIVATIVE:
            raise MeasurementError(
                f"the third derivative of {node.name()} is wrong in torch, without a word.",
                "Use estimator='perturbation', or normalize by torch.nn.functional's "
                "batch_norm, layer_norm or instance_norm (any torch.nn module but "
                "SyncBatchNorm does).",
            )
        for below, _ in node.next_functions:
            if below not in seen:
                seen.add(below)
                waiting.append(below)

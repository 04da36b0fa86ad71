"""The spectral density: quadrature nodes and weights, broadened for drawing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def broadened(
    nodes: Tensor,
    weights: Tensor,
    grid: Tensor,
    width: float | Tensor,
    within: tuple[float, float] | None = None,
) -> Tensor:
    """Return the density ``sum_j w_j N(x; theta_j, width_j)`` on a grid of eigenvalues.

    Args:
        nodes: ``theta``, shape ``(k,)``.
        weights: ``w``, shape ``(k,)``; their sum is the integral of the density.
        grid: ``x``, shape ``(p,)``, in eigenvalue units.
        width: Standard deviation of the Gaussians, in eigenvalue units, positive; one for
            all nodes, or one a node, shape ``(k,)``.
        within: Smallest and largest eigenvalue there is. Gaussians are cut there, and each keeps
            its weight by being higher between; ``None``: nothing is cut.

    Returns:
        Shape ``(p,)``, per eigenvalue unit; zero outside of ``within``.
    """
    if not bool(torch.as_tensor(width > 0).all()):
        raise ValueError(f"width is {width}; give a positive number of eigenvalue units.")
    offsets = (grid[:, None] - nodes[None, :]) / width
    kernel = torch.exp(-0.5 * offsets**2) / (width * math.sqrt(2 * math.pi))
    if within is None or not within[0] < within[1]:
        return kernel @ weights
    ends = ((end - nodes) / width / math.sqrt(2) for end in within)
    below, above = (0.5 * torch.erf(end) for end in ends)
    inside = (grid >= within[0]) & (grid <= within[1])
    return inside * (kernel @ (weights / (above - below).clamp(min=1e-12)))


def spacing(nodes: Tensor) -> Tensor:
    """Return half the distance between each node's neighbours, shape ``(k,)``.

    The scale below which a quadrature says nothing about where its weight lies.

    Args:
        nodes: Ascending, shape ``(k,)``, of one run.
    """
    if len(nodes) < 2:
        return torch.zeros_like(nodes)
    gaps = nodes.diff()
    return torch.cat([gaps[:1], (gaps[:-1] + gaps[1:]) / 2, gaps[-1:]])


def resolved_density(
    nodes: Tensor,
    weights: Tensor,
    run_sizes: Sequence[int],
    grid: Tensor,
    width: float,
    within: tuple[float, float] | None = None,
) -> Tensor:
    """Return the density with each node as wide as the quadrature is uncertain about it.

    Without this a shallow run draws gaps into a bulk that has none.

    Args:
        nodes: Of all runs, ascending within each, shape ``(k,)``.
        weights: Shape ``(k,)``.
        run_sizes: How many nodes each run has, in order.
        grid: Shape ``(p,)``.
        width: The least width of a node.
        within: Smallest and largest eigenvalue there is; see :func:`broadened`.
    """
    widths = torch.cat([spacing(part) for part in torch.split(nodes, list(run_sizes))])
    return broadened(nodes, weights, grid, (0.5 * widths).clamp(min=width), within)


def default_width(nodes: Tensor) -> float:
    """Return 1 % of the nodes' range (choice: outliers stay apart on a linear axis)."""
    span = float(nodes.max() - nodes.min())
    return 0.01 * span if span > 0 else max(1e-2 * float(nodes.abs().max()), 1e-12)


def sampling_error(function: Callable[[Tensor], float], weights: Tensor, dim: int) -> float:
    """Return the standard error of a function of the weights of *one* quadrature.

    By :func:`propagated_error` for the function's slopes.

    Args:
        function: From weights, shape ``(k,)``, to a number.
        weights: Shape ``(k,)``, float64, sum 1.
        dim: Dimension of the operator.
    """
    slopes = torch.zeros_like(weights)
    for j in range(len(weights)):
        # A relative step: functions of small powers of the weights bend near zero.
        step = 1e-4 * float(weights[j])
        if step == 0:
            continue
        moved = weights.clone()
        moved[j] += step
        upper = function(moved)
        moved[j] -= 2 * step
        slopes[j] = (upper - function(moved)) / (2 * step)
    return propagated_error(slopes, weights, dim)


def propagated_error(slopes: Tensor, weights: Tensor, dim: int) -> float:
    """Return the standard error that random quadrature weights leave in a function of them.

    A weight is the share of a random vector's squared norm that lies in the eigenspaces
    which its node stands for. For a Gaussian vector ``w_j ~ chi^2(dim p_j) / dim`` for a
    share ``p_j`` of all eigenvalues, so ``Var w_j = 2 p_j / dim``, and jointly a Dirichlet
    law; for random signs this holds nearly, as long as eigenvectors are spread over many
    coordinates, and is too large where they are not. To first order

        ``Var f = (2 / dim) sum_j w_j (f_j - fbar)^2``, ``f_j = df/dw_j``, ``fbar = sum w_j f_j``.

    For ``f = dim sum w theta`` this is the known variance ``2 ||A - tr(A)/dim I||_F^2`` of a
    spherical trace probe. Node positions are taken as fixed.

    Args:
        slopes: ``f_j``, shape ``(k,)``.
        weights: ``w_j``, shape ``(k,)``, float64, sum 1.
        dim: Dimension of the operator, times the runs where weights are a mean over several.
    """
    centred = slopes - (weights * slopes).sum()
    return math.sqrt(2 / dim * float((weights * centred**2).sum()))

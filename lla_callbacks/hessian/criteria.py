"""Scalars of a spectrum, from the nodes and weights of a stochastic Lanczos quadrature.

Each function takes the nodes ``theta`` (ascending) and weights ``w`` (non-negative, sum 1)
of *one* Lanczos run, as float64 tensors of shape ``(num_steps,)``. Where a criterion is
not defined it is NaN, never an exception: a spectrum without a positive part is rare but
real (before the first step of a badly scaled network), and the run goes on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Nodes within this share of the largest magnitude are zero up to float32 rounding.
ROUNDING = 10 * torch.finfo(torch.float32).eps

# Below this ratio of extremes LLA calls a spectrum "mainly negative" (`mp_hesd_check`).
MAINLY_POSITIVE_ABOVE = -0.6


def extreme_ratio(nodes: Tensor) -> float:
    """Return ``theta_min / theta_max``, LLA's ``C_t`` (Gabdullin 2025); its magnitude is ``r_e``.

    NaN where no eigenvalue is positive beyond rounding: the ratio would mean nothing.
    """
    largest = float(nodes[-1])
    threshold = ROUNDING * float(nodes.abs().max())
    return float(nodes[0]) / largest if largest > threshold else math.nan


def negative_to_positive(nodes: Tensor, weights: Tensor, power: float) -> float:
    """Return LLA's ``K_H^n`` (Gabdullin 2024), ``n = power``; KH05 is ``power=0.5``.

    ``sum_{theta<0} |theta w|^n / sum_{theta>0} (theta w)^n``. About 1 at initialisation
    and towards 0 in training. For ``n < 1`` it **depends on the depth** of the Lanczos run
    (splitting a node into k multiplies its share by ``k^(1-n)``), so values compare only
    at equal ``num_steps``; published ones use 100. For ``n = 1`` it tends to
    ``tr |H_-| / tr H_+`` and does not depend on the depth. NaN without a positive node.
    """
    threshold = ROUNDING * float(nodes.abs().max())
    mass = (nodes.abs() * weights) ** power
    positive = float(mass[nodes > threshold].sum())
    return float(mass[nodes < -threshold].sum()) / positive if positive > 0 else math.nan


def mainly_positive(ratio: float) -> float:
    """Return 1 for LLA's "mainly positive" spectrum type, 0 for "mainly negative".

    By ``C_t >= -0.6`` (:func:`extreme_ratio`). Expect 0 at initialisation, where spectra are
    nearly symmetric.
    """
    return math.nan if math.isnan(ratio) else float(ratio >= MAINLY_POSITIVE_ABOVE)


def negative_mass(nodes: Tensor, weights: Tensor) -> float:
    """Return ``sum_{theta<0} w``: the fraction of eigenvalues that are negative."""
    threshold = ROUNDING * float(nodes.abs().max())
    return float(weights[nodes < -threshold].sum())


def negative_mass_bound(nodes: Tensor, weights: Tensor) -> float:
    """Return a bound of :func:`negative_mass`'s error from the quadrature's resolution.

    By the inequalities of Chebyshev, Markov and Stieltjes (Golub and Meurant 2010, section
    2.2) the true share below zero lies between the weights strictly below the last negative
    node and those up to the first node that is not negative: the two nodes next to zero
    decide. Where most eigenvalues are nearly zero this is large, and rightly so.
    """
    threshold = ROUNDING * float(nodes.abs().max())
    below = int((nodes < -threshold).sum())
    last = float(weights[below - 1]) if below > 0 else 0.0
    first = float(weights[below]) if below < len(nodes) else 0.0
    return max(last, first)


def effective_dimension(nodes: Tensor, weights: Tensor, dim: int, precision: float = 1.0) -> float:
    """Return ``N_eff = dim sum_{theta>0} w theta / (theta + z)``, ``z = precision``.

    The number of directions in which the loss curves more than ``z`` (MacKay 1992; Maddox
    et al. 2020). For a mean loss over N samples ``z`` stands for a Gaussian prior of
    precision ``N z``. Default 1: the unit of the loss's own curvature (choice).
    """
    positive = nodes.clamp(min=0)
    return dim * float((weights * positive / (positive + precision)).sum())

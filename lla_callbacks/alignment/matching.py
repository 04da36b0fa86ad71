"""Match units of two networks by their weights: linear assignments, group after group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lla_callbacks.alignment.groups import Group, entries, permuted

# Sweeps that never end are a fault of rounding.
MOST_SWEEPS = 100


def match(
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    groups: Sequence[Group],
    *,
    weigh: Sequence[str],
    restarts: int,
    seed: int,
) -> tuple[list[Tensor], float]:
    """Return permutations of the end's units that bring it closest to the start, and the gain.

    Weight matching of git re-basin (Ainsworth et al. 2022, section 3.2): maximize ``sum <A,
    pi(B)>`` over tensors; with all groups but one fixed that is a linear assignment. Groups are
    visited in random order until none improves. It is a local optimum, and where residual
    connections make one group of many layers often not the best: the best of several starts is
    kept, the first of which is the identity.

    Args:
        start: Weights of the network that stays.
        end: Weights of the one whose units move.
        groups: What may move.
        weigh: Names that count: parameters, not statistics.
        restarts: Starts, at least 1.
        seed: Of orders and starts.
    """
    assign = _assignment()
    counted = set(weigh)
    a = {n: start[n].double().cpu() for n in counted}
    b = {n: end[n].double().cpu() for n in counted}
    source = torch.Generator().manual_seed(seed)
    best: tuple[float, list[Tensor]] | None = None
    for attempt in range(restarts):
        present = [
            torch.randperm(g.size, generator=source) if attempt else torch.arange(g.size)
            for g in groups
        ]
        for _ in range(MOST_SWEEPS):
            improved = False
            for k in torch.randperm(len(groups), generator=source).tolist():
                gain, size = _gain(a, b, groups, present, k)
                now = float(gain[torch.arange(len(gain)), present[k]].sum())
                found = assign(gain)
                # Rounding of n sums is no improvement.
                if float(gain[torch.arange(len(gain)), found].sum()) > now + 1e-12 * size:
                    present[k], improved = found, True
            if not improved:
                break
        moved = permuted(b, _counted(groups, counted), present)
        total = float(sum((a[n] * moved[n]).sum() for n in counted))
        if best is None or total > best[0]:
            best = total, present
    assert best is not None
    before = float(sum((a[n] * b[n]).sum() for n in counted))
    return best[1], best[0] - before


def _gain(
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    groups: Sequence[Group],
    present: Sequence[Tensor],
    k: int,
) -> tuple[Tensor, float]:
    """Return ``<A unit i, B unit j>``, other axes as they are at present, and its scale."""
    total = torch.zeros(groups[k].size, groups[k].size, dtype=torch.float64)
    scale = 0.0
    for axis in groups[k].axes:
        if axis.name not in a:
            continue
        other = b[axis.name]
        for g, p in zip(groups, present, strict=True):
            for own in g.axes:
                if own.name == axis.name and own.dim != axis.dim:
                    other = other.index_select(own.dim, entries(p, own.repeat))
        rows = [t.movedim(axis.dim, 0).reshape(groups[k].size, -1) for t in (a[axis.name], other)]
        total += rows[0] @ rows[1].T
        scale += float(rows[0].norm() * rows[1].norm())
    return total, scale


def _counted(groups: Sequence[Group], names: set[str]) -> list[Group]:
    return [
        Group(g.name, g.size, tuple(axis for axis in g.axes if axis.name in names)) for g in groups
    ]


def _assignment() -> Callable[[Tensor], Tensor]:
    """Return the solver: from gains ``(n, n)`` to the column of each row."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError(
            "alignment needs scipy's linear assignment: pip install 'lla_callbacks[align]', or "
            "pip install scipy."
        ) from error

    def assign(gain: Tensor) -> Tensor:
        _, columns = linear_sum_assignment(gain.numpy(), maximize=True)
        return torch.as_tensor(columns, dtype=torch.long)

    return assign

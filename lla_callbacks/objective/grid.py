"""Grids of coordinates, the order in which they are visited, and sharing among processes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lla_callbacks.linalg.sharing import Share
from lla_callbacks.objective.checks import shown


def centred(reach: float, count: int) -> Tensor:
    """Return ``count`` coordinates from ``-reach`` to ``reach``, float64, exactly 0 in the middle.

    Raises:
        ValueError: If ``count`` is even or below 3, or ``reach`` not positive.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 3 or count % 2 == 0:
        raise ValueError(
            f"{count!r} points a side do not have the centre among them: give an odd whole "
            "number of at least 3, such as 17."
        )
    if not (reach > 0 and math.isfinite(reach)):
        raise ValueError(f"the range reaches {reach!r}; give a positive number.")
    steps = torch.arange(count, dtype=torch.float64) - (count - 1) // 2
    return steps * (reach / ((count - 1) // 2))


def spanning(low: float, high: float, count: int) -> Tensor:
    """Return ``count`` even coordinates that reach from ``low`` to ``high``, with 0 among them.

    They reach up to one spacing further, so that one of them is exactly 0.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if high == low:
        low, high = -1.0, 1.0
    spacing = (high - low) / max(count - 2, 1)
    below = math.ceil(-low / spacing - 1e-9)
    return (torch.arange(count, dtype=torch.float64) - below) * spacing


def coordinates(name: str, values: object) -> Tensor:
    """Return a user's own coordinates as float64, shape ``(n,)``.

    Raises:
        ValueError: If they are not finite, strictly ascending numbers.
    """
    try:
        found = torch.as_tensor(values, dtype=torch.float64).detach().cpu().reshape(-1)
    except Exception as error:  # whatever an object's own conversion raises
        raise ValueError(f"{name} is {shown(values)}; give ascending numbers.") from error
    if isinstance(values, (bool, int, float)) or getattr(values, "ndim", 1) == 0:
        raise ValueError(f"{name} is {shown(values)}; give a list of ascending numbers.")
    if not found.numel() or not torch.isfinite(found).all() or bool((found.diff() <= 0).any()):
        raise ValueError(f"{name} is {found.tolist()}; give finite, strictly ascending numbers.")
    return found


def coarse_to_fine(shape: Sequence[int], centre: Sequence[int]) -> list[list[int]]:
    """Return the flat indices of a grid in levels, each a complete picture with those before.

    The first level is the centre alone; then every point whose distances from the centre are
    multiples of a stride, which halves from level to level down to 1; the ends of each axis
    join with the first stride, so that the picture has its full extent early.
    """
    reach = max(max(c, n - 1 - c) for n, c in zip(shape, centre, strict=True))
    levels = [[_flat(centre, shape)]]
    seen = set(levels[0])
    stride = 2 ** max(0, (reach - 1).bit_length()) if reach else 1
    while stride >= 1:
        axes = [
            sorted({i for i in range(n) if (i - c) % stride == 0} | {0, n - 1})
            for n, c in zip(shape, centre, strict=True)
        ]
        level = [
            flat for index in itertools.product(*axes) if (flat := _flat(index, shape)) not in seen
        ]
        seen.update(level)
        if level:
            levels.append(level)
        stride //= 2
    return levels


def complete_axes(shape: Sequence[int], evaluated: Tensor, centre: Sequence[int]) -> list[Tensor]:
    """Return the indices along each axis of the finest sub-grid that is complete.

    Args:
        shape: Of the grid.
        evaluated: Which points are done, of that shape.
        centre: Index of the centre.
    """
    best = [torch.tensor([c]) for c in centre]
    stride = 2 ** max(0, max(n - 1 for n in shape).bit_length())
    while stride >= 1:
        axes = [
            torch.tensor(sorted({i for i in range(n) if (i - c) % stride == 0} | {0, n - 1}))
            for n, c in zip(shape, centre, strict=True)
        ]
        mesh = torch.meshgrid(*axes, indexing="ij")
        if bool(evaluated[mesh].all()):
            best = axes
        stride //= 2
    return best


def _flat(index: Iterable[int], shape: Sequence[int]) -> int:
    flat = 0
    for i, n in zip(index, shape, strict=True):
        flat = flat * n + i
    return flat


def gathered(share: Share, table: Tensor, done: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Return what all processes found together.

    Args:
        share: The processes.
        table: One row a point, those of this process filled in.
        done: Which points this process knows.
        before: Which of them all processes knew before.
    """
    if share.size == 1:
        return table, done
    new = (done & ~before).double()
    # Not finite values do not survive a sum with zeros, so they travel as codes.
    clean = torch.nan_to_num(table, nan=0.0, posinf=0.0, neginf=0.0) * new[:, None]
    codes = (table.isnan() + 2.0 * table.isposinf() + 3.0 * table.isneginf()) * new[:, None]
    clean, codes, new = (share.total(t) for t in (clean, codes.double(), new))
    for code, value in ((1, "nan"), (2, "inf"), (3, "-inf")):
        clean = torch.where(codes == code, float(value), clean)
    found = new > 0
    return torch.where(found[:, None], clean, table), before | found


Keep = Callable[[Tensor, Tensor], None]

"""Parameters that FSDP1 has made one flat one of, and cut: which entries a process has of each.

``FullyShardedDataParallel(use_orig_params=True)`` lets each original parameter be, between two
passes, a flat piece of itself, possibly empty. Which piece only private attributes tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# What is asked of a flat parameter (found in torch 2.13 and 2.14).
_ASKED = ("_params", "_shapes", "_strides", "_contiguities", "_shard_param_infos")


class FlatPart(NamedTuple):
    """Which entries of a parameter this process has.

    ``first`` is the place of the first in the whole parameter, row by row, where they follow each
    other; else ``places`` are those of all. ``numel`` counts the whole parameter's entries, and
    ``group`` are the processes that have them between them.
    """

    first: int
    numel: int
    group: Any
    places: Tensor | None = None


def flat_parts(model: nn.Module) -> dict[int, FlatPart]:
    """Return by identity of a parameter which entries of it this process has; empty without FSDP1.

    What a part has gathered for a pass is let go of, so that its parameters are pieces again.

    Args:
        model: What the strategy trains: the outermost wrapper.

    Raises:
        ValueError: If it cannot be told, with what to do.
    """
    found: dict[int, FlatPart] = {}
    for unit in flat_units(model):
        handle = getattr(unit, "_handle", None)
        if handle is None:
            continue
        flat = handle.flat_param
        if not all(hasattr(flat, name) for name in _ASKED):
            raise ValueError(
                "this release of torch keeps FSDP1's flat parameters in another way. Use torch's "
                "fully_shard (FSDP2) under ModelParallelStrategy."
            )
        if flat._params is None:
            raise ValueError(
                "FullyShardedDataParallel(use_orig_params=False) hides which parameter is which. "
                "Give use_orig_params=True, Lightning's default."
            )
        if not handle.uses_sharded_strategy:
            continue
        _reshard(unit, handle)
        for p, shape, stride, contiguous, info in zip(
            *(getattr(flat, name) for name in _ASKED), strict=True
        ):
            first = info.intra_param_start_idx if info.in_shard else 0
            places = None
            if info.in_shard and not contiguous:
                rows = torch.empty_strided(shape, stride, dtype=torch.int64)
                rows.copy_(torch.arange(shape.numel()).view(shape))
                flattened = rows.as_strided((shape.numel(),), (1,))
                places = flattened[first : info.intra_param_end_idx + 1].to(p.device)
            found[id(p)] = FlatPart(first, shape.numel(), handle.process_group, places)
    return found


def flat_units(model: nn.Module) -> list[Any]:
    """Return the parts of a model that FSDP1 has wrapped."""
    return [m for m in model.modules() if type(m).__name__ == "FullyShardedDataParallel"]


def summed(values: Sequence[Tensor], parts: Sequence[FlatPart]) -> list[Tensor]:
    """Return sums of scalars over the processes that share each parameter, one exchange a group."""
    found = list(values)
    groups: dict[int, list[int]] = {}
    for i, part in enumerate(parts):
        groups.setdefault(id(part.group), []).append(i)
    for chosen in groups.values():
        together = torch.stack([values[i] for i in chosen])
        torch.distributed.all_reduce(together, group=parts[chosen[0]].group)
        for i, value in zip(chosen, together, strict=True):
            found[i] = value
    return found


def root_mean_squares(
    parameters: Mapping[str, Tensor], parts: Mapping[str, FlatPart]
) -> dict[str, Tensor]:
    """Return the root mean square of each whole parameter, from the pieces of all processes."""
    names = list(parts)
    squares = [parameters[name].detach().square().sum() for name in names]
    sums = summed(squares, list(parts.values())) if names else []
    return {n: (s / parts[n].numel).sqrt() for n, s in zip(names, sums, strict=True)}


def _reshard(unit: Any, handle: Any) -> None:
    """Let go of what an evaluation has left gathered: it is from before the weights move.

    The outermost part keeps it, and the next pass would not gather again.
    """
    # Nothing was ever gathered before its first pass.
    if unit._is_root is not None and not handle.needs_unshard():
        from torch.distributed.fsdp._runtime_utils import _reshard as let_go

        let_go(unit, handle, True)

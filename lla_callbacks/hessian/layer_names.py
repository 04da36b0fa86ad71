"""Names of layers, short enough for a figure and still each its own."""

from __future__ import annotations

from collections.abc import Sequence


def short_names(names: Sequence[str]) -> list[str]:
    """Return paths without the parts that tell nothing: those that are the same everywhere.

    First the parts that all paths begin with, then those that all of the longer ones share at a
    place, and at the end. A path whose rest would be another's keeps what tells them apart.

    Example::

        >>> short_names(["m.layer.0.q.lora_A.default", "m.layer.1.q.lora_A.default", "m.head"])
        ['layer.0.q.lora_A', 'layer.1.q.lora_A', 'head']

    Args:
        names: Paths with dots, each once.
    """
    paths = [name.split(".") for name in names]
    if len(paths) < 2:
        return list(names)
    for cut in (_without_start, _without_end, _without_middle):
        shorter = cut(paths)
        if len({".".join(p) for p in shorter}) == len(names) and all(shorter):
            paths = shorter
    return [".".join(path) for path in paths]


def _most(paths: list[list[str]]) -> list[list[str]]:
    """Return the paths of the repeated part: those as deep as the deepest but one level."""
    deepest = max(map(len, paths))
    return [path for path in paths if len(path) >= max(2, deepest - 1)]


def _without_start(paths: list[list[str]]) -> list[list[str]]:
    """Drop the parts that all long paths begin with, from those that begin with them."""
    many = _most(paths)
    count = 0
    while many and all(len(p) > count + 1 and p[count] == many[0][count] for p in many):
        count += 1
    # A word before an index says what it counts.
    if count and many[0][count].isdigit():
        count -= 1
    start = many[0][:count] if many else []
    return [p[count:] if count and p[:count] == start and len(p) > count else p for p in paths]


def _without_end(paths: list[list[str]]) -> list[list[str]]:
    """Drop a last part that all long paths share."""
    many = _most(paths)
    if len(many) < 2 or len({p[-1] for p in many}) > 1 or many[0][-1].isdigit():
        return paths
    last = many[0][-1]
    return [p[:-1] if len(p) > 1 and p[-1] == last else p for p in paths]


def _without_middle(paths: list[list[str]]) -> list[list[str]]:
    """Drop parts within that all paths of the same depth share, indices and the first kept."""
    deepest = max(map(len, paths))
    many = [p for p in paths if len(p) == deepest]
    if deepest < 5 or len(many) < 2:
        return paths
    same = [
        k for k in range(1, deepest - 1)
        if len({p[k] for p in many}) == 1 and not many[0][k].isdigit()
        and not (k + 1 < deepest and many[0][k + 1].isdigit())
    ]  # fmt: skip
    return [
        [part for k, part in enumerate(p) if k not in same] if len(p) == deepest else p
        for p in paths
    ]

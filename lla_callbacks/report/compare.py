"""Several results over or beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from lla_callbacks.objective.spelling import spelled
from lla_callbacks.report.picture import heading
from lla_callbacks.report.result import Result


@spelled
def compare(*results: Any, names: Sequence[str] | None = None, title: str = "") -> Figure:
    """Return several results of one kind in one figure.

    Spectra lie over each other, and so do lines, curves and basins; planes and convexity maps
    stand beside each other in one colour scale; runs (monitors, or their histories) become
    curves over steps with their errors as bands.

    Args:
        results: Two or more of one kind: what ``measure_hessian``, ``loss_line``,
            ``loss_plane``, ``interpolate``, ``convexity_map``, ``basin_radii`` or ``loss_curve``
            returned, or monitors, or histories of them.
        names: Of each; ``None``: a, b, c, ...
        title: Above the figure.

    Raises:
        ValueError: If kinds are mixed, or cannot be compared, or names do not fit, by name.

    Example::

        >>> import torch
        >>> from lla_callbacks import compare, measure_hessian
        >>> nets = [torch.nn.Linear(3, 1) for _ in range(2)]
        >>> def loss(module, batch):
        ...     return module(batch).square().mean()
        >>> reports = [measure_hessian(net, [torch.randn(8, 3)], loss=loss) for net in nets]
        >>> figure = compare(*reports, names=["one", "other"])
    """
    if len(results) < 2:
        raise ValueError(f"there is {len(results)} result to compare; give two or more.")
    named = _names(names, len(results))
    histories = [_history_of(result) for result in results]
    found = None
    if all(history is not None for history in histories):
        kinds = list(dict.fromkeys(type(r).__name__ for h in histories for _, r in h or ()))
        _one_kind(kinds, "histories")
        first = next(iter(histories[0] or ()))[1]
        found = first._compared_runs(histories, named) if hasattr(first, "_compared_runs") else None
        what = f"histories of {kinds[0]}"
    else:
        kinds = list(dict.fromkeys(type(result).__name__ for result in results))
        _one_kind(kinds, "results")
        what = kinds[0]
        if isinstance(results[0], Result):
            found = results[0]._compared(results, named)
    if found is None:
        raise ValueError(
            f"{what} cannot be laid over each other; give reports of the Hessian, lines, planes, "
            "curves, basins, convexity maps, or monitors."
        )
    heading(found, title)
    return found


def _history_of(result: Any) -> Sequence[tuple[int, Any]] | None:
    """Return the history that something is or holds, or None."""
    history = getattr(result, "history", result)
    if isinstance(result, Result) or not isinstance(history, (list, tuple)):
        return None
    if not history:
        raise ValueError(
            "a history is empty: nothing was measured yet; give one with a result or more."
        )
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in history):
        return None
    return history


def _one_kind(kinds: Sequence[str], what: str) -> None:
    if len(kinds) > 1:
        raise ValueError(
            f"the {what} are of several kinds, {', '.join(kinds)}; give {what} of one kind."
        )


def _names(names: Any, count: int) -> list[str]:
    if names is None:
        return [chr(ord("a") + i % 26) + (str(i // 26) if i >= 26 else "") for i in range(count)]
    if isinstance(names, str) or not isinstance(names, Sequence) or len(names) != count:
        raise ValueError(f"names is {names!r}; give {count} names, one for each result.")
    return [str(name) for name in names]

"""Arguments by name; those that older code gave by position still mean what they did."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from lla_callbacks import (
    FastGeometricEnsembling,
    HessianMonitor,
    HessianTraceRegularizer,
    LossLandscapeMonitor,
    ModeConnection,
    Monitor,
    PoisonedLoss,
    Spectrum,
)

from .modules import Plain

ONE, OTHER = Plain(), Plain()
BATCHES = [[1]]
QUANTITY = Spectrum()
CALLS: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = [
    (HessianTraceRegularizer, (1e-3,), {"layers": "middle", "estimator": "exact"}),
    (PoisonedLoss, (0.5, BATCHES), {"labels": "true", "start_step": 3}),
    (ModeConnection, (ONE, OTHER), {"kind": "chain", "bends": 2}),
    (HessianMonitor, (2, 3), {"track_every_n_train_steps": 5, "track_num_probes": 2}),
    (LossLandscapeMonitor, (2, 3), {"planes": ["random"], "lines": []}),
    (Monitor, ([QUANTITY], 2, 3), {"num_samples": 5}),
    (FastGeometricEnsembling, (2, 0.1, 0.01), {"start": 0.5}),
]


def settings(made: Any) -> dict[str, Any]:
    kinds = (int, float, str)
    found: dict[str, Any] = {k: v for k, v in vars(made).items() if isinstance(v, kinds)}
    for name in ("tracking_schedule", "shared_settings", "settings", "layers"):
        found[name] = repr(getattr(made, name, None))
    return found


@pytest.mark.parametrize(("kind", "first", "rest"), CALLS)
def test_by_position_is_by_name_with_one_warning(
    kind: Callable[..., Any], first: tuple[Any, ...], rest: dict[str, Any]
) -> None:
    by_name = kind(*first, **rest)  # warnings are errors
    names = ", ".join(f"{name}=..." for name in rest)
    with pytest.warns(DeprecationWarning, match=rf"by name, .*\(\.\.\., {names}\)") as record:
        by_position = kind(*first, *rest.values())
    assert len(record) == 1
    assert record[0].filename == __file__
    assert settings(by_position) == settings(by_name)
    assert settings(by_name) != settings(kind(*first))


@pytest.mark.parametrize(("kind", "first", "rest"), CALLS)
def test_nothing_is_taken_twice_or_unknown(
    kind: Callable[..., Any], first: tuple[Any, ...], rest: dict[str, Any]
) -> None:
    name = next(iter(rest))
    with pytest.raises(TypeError, match=f"got {name} twice, by position and by name"):
        kind(*first, rest[name], **{name: rest[name]})
    with pytest.raises(TypeError, match="takes at most"):
        kind(*first, *[1] * 60)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nothing'"):
        kind(*first, nothing=1)


@pytest.mark.parametrize("kind", [kind for kind, _, _ in CALLS])
def test_the_signature_says_so(kind: Callable[..., Any]) -> None:
    kinds = [p.kind for p in inspect.signature(kind).parameters.values()]
    assert kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) <= 3
    assert inspect.Parameter.KEYWORD_ONLY in kinds

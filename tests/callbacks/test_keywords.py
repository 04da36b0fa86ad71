"""Arguments by name; those that older code gave by position still mean what they did."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lla_callbacks import (
    FastGeometricEnsembling,
    HessianMonitor,
    HessianTraceRegularizer,
    LossLandscapeMonitor,
    ModeConnection,
    Monitor,
    PoisonedLoss,
    Slices,
    Spectrum,
    aligned,
    economy,
    interpolate,
    loss_plane,
    measure_hessian,
)
from lla_callbacks.hessian.settings import HessianSettings

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


NET, BATCH = torch.nn.Linear(3, 2), [(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: HessianMonitor(nun_steps=3), "'nun_steps'; did you mean num_steps?"),
        (lambda: LossLandscapeMonitor(plane_point=3), "'plane_point'; did you mean plane_points?"),
        (lambda: PoisonedLoss(0.5, BATCHES, label="true"), "'label'; did you mean labels?"),
        (lambda: Spectrum(setting=3), r"Spectrum\(\) .*'setting'; did you mean settings?"),
        (lambda: Slices(interpolat=3), r"Slices\(\) .*'interpolat'; did you mean interpolate?"),
        (
            lambda: measure_hessian(NET, BATCH, los=None),
            r"measure_hessian\(\) got an unexpected keyword argument 'los'; did you mean loss\?",
        ),
        (lambda: loss_plane(NET, BATCH, direction="top1"), "did you mean directions?"),
        (lambda: aligned(NET, NET, BATCH[0], sed=1), "did you mean seed?"),
        (lambda: economy(trace_regularisation=1e-3), "did you mean trace_regularization?"),
        (lambda: economy(nothing=3), "a bundle does not take 'nothing'; it takes the settings"),
        (lambda: measure_hessian(NET, BATCH, zzz=1), "unexpected keyword argument 'zzz'$"),
    ],
)
def test_a_misspelled_argument_is_told_what_was_meant(call: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        call()


def test_functions_keep_their_signatures_and_names() -> None:
    for function in (measure_hessian, loss_plane, aligned, interpolate):
        assert "module" in inspect.signature(function).parameters or function is not loss_plane
        assert pickle.loads(pickle.dumps(function)) is function
        assert function.__doc__
    assert list(inspect.signature(measure_hessian).parameters)[:3] == ["module", "batches", "loss"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Monitor([Spectrum]), r"quantities is a list with the class Spectrum; give a list"),
        (lambda: Monitor(Spectrum), r"quantities is the class Spectrum; .* such as \[Spectrum\(\)"),
        (lambda: Monitor(Spectrum()), r"quantities is one quantity; give a list of"),
        (
            lambda: Spectrum(HessianSettings),
            r"settings is the class .*made: HessianSettings\(\.\.\.\)",
        ),
        (lambda: HessianMonitor(dataloader=torch.utils.data.DataLoader), "is the class DataLoader"),
        (lambda: measure_hessian(NET, torch.utils.data.DataLoader), "batches is the class DataL"),
        (lambda: measure_hessian(NET, BATCH, optimizer=torch.optim.SGD), "optimizer is the class"),
        (lambda: measure_hessian(torch.nn.Linear, BATCH), "module is the class Linear; give a"),
        (lambda: ModeConnection(torch.nn.Linear, NET), "start is the class Linear; give a module"),
        (lambda: HessianMonitor(loss=torch.nn.MSELoss), "loss is the class MSELoss; give loss"),
    ],
)
def test_a_class_in_the_place_of_an_instance_is_named(call: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        call()

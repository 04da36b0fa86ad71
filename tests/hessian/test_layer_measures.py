"""Each layer's block against the dense Hessian's, and what its numbers cost."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor, nn

from lla_callbacks import measure_hessian
from lla_callbacks.hessian.layer_measures import PILOT_PROBES, LayerPlan, measure_layers
from lla_callbacks.hessian.settings import HessianSettings
from lla_callbacks.linalg.distance import Quadrature
from lla_callbacks.linalg.lanczos import lanczos
from lla_callbacks.linalg.probes import generator, rademacher
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.linalg.student import widened_sem
from lla_callbacks.linalg.trace import TraceEstimator
from lla_callbacks.objective.layers import layer_parameters
from lla_callbacks.objective.objective import Objective, trainable
from tests.cases import CASES, UNUSED, Case, dense_hessian, loss_with_linear_part

# As for the whole: central differences of float64 gradients.
TOLERANCE = 2e-7
CPU = torch.device("cpu")


def blocks_of(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the dense Hessian and each layer's positions in it."""
    module, batches, loss = case.build()
    dense = dense_hessian(module, batches, loss, case.mode)
    space = ParameterSpace(trainable(module))
    return dense, {k: space.index(v) for k, v in layer_parameters(module, space).items()}


def block(dense: Tensor, positions: Tensor) -> Tensor:
    return dense[positions][:, positions]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_block_agrees_with_the_dense_one(case: Case) -> None:
    dense, positions = blocks_of(case)
    module, batches, loss = case.build()
    report = measure_hessian(
        module, batches, loss=loss, mode=case.mode, num_steps=len(dense),
        num_layer_steps=len(dense), num_layer_probes=6,
    )  # fmt: skip
    tolerance = TOLERANCE * max(float(torch.linalg.eigvalsh(dense).abs().max()), 1)
    values, vectors = torch.linalg.eigh(dense)
    start = rademacher(len(dense), generator(0), dtype=torch.float64, device=CPU)
    whole = values / values.abs().max(), (vectors.T @ start) ** 2 / len(dense)
    assert list(report.layers) == list(positions)
    for name, index in positions.items():
        layer, spectrum = report.layers[name], report.layers[name].spectrum
        assert spectrum is not None
        exact, own = torch.linalg.eigh(block(dense, index))
        for found, value in ((spectrum.lambda_max, exact[-1]), (spectrum.lambda_min, exact[0])):
            assert abs(found - float(value)) <= tolerance + found.residual
        assert abs(layer.trace - float(exact.sum())) <= len(index) * tolerance + 5 * layer.trace_sem
        assert layer.num_params == len(index)
        if float(exact.abs().max()) < tolerance:
            continue
        # At full depth the quadrature is that of the start vectors, whose law is known.
        z = rademacher(len(index), generator(0, 2, int(index[0])), dtype=torch.float64, device=CPU)
        weights = (own.T @ z) ** 2 / len(index)
        shape = exact / exact.abs().max()
        expected = wasserstein_distance(shape, whole[0], weights, whole[1])
        assert spectrum.distance == pytest.approx(expected, abs=1e-5)


def test_a_layer_never_curves_more_than_the_whole() -> None:
    module, batches, loss = CASES[0].build()
    report = measure_hessian(module, batches, loss=loss, num_steps=43, num_layer_steps=43)
    for layer in report.layers.values():
        assert layer.spectrum is not None
        assert layer.spectrum.lambda_max <= report.lambda_max + 1e-9
        assert layer.spectrum.lambda_min >= report.lambda_min - 1e-9


def test_one_layer_that_is_all_there_is_has_no_distance_but_noise() -> None:
    module, batches, loss = CASES[0].build()
    report = measure_hessian(
        nn.ModuleDict({"net": module}), batches, loss=lambda m, b: loss(m["net"], b),
        layers="net", num_runs=5, num_steps=43, num_layer_steps=43,
    )  # fmt: skip
    spectrum = report.layers["net"].spectrum
    assert spectrum is not None
    assert spectrum.lambda_max == pytest.approx(report.lambda_max, rel=1e-9)
    assert 0 < spectrum.distance <= 3 * spectrum.distance_error


def test_block_probes_have_the_known_variance_and_the_sem_they_report() -> None:
    module, batches, loss = CASES[0].build()
    dense, positions = blocks_of(CASES[0])
    hessian = Objective(module, batches, loss).hessian()
    groups = layer_parameters(module, hessian.space)
    start = rademacher(hessian.shape[0], generator(0), dtype=hessian.dtype, device=CPU)
    whole = Quadrature.of([lanczos(hessian, start, 4)], hessian.shape[0])
    repeats, count = 100, 6
    estimates = []
    for seed in range(repeats):
        # Two probes of the whole: so noisy that the block's own are always taken.
        estimator = TraceEstimator(hessian, {k: v for k, v in positions.items()})
        source = generator(seed)
        estimator.add_probe(source)
        estimator.add_probe(source)
        traces = estimator.estimate()
        noisy = {k: (value, 1e3) for k, (value, _) in traces.blocks.items()}
        object.__setattr__(traces, "blocks", noisy)
        plan = LayerPlan(num_steps=0, num_runs=1, num_probes=count, eig_rtol=None, seed=seed)
        estimates.append(measure_layers(hessian, groups, whole, traces, plan))
    for name, index in positions.items():
        b = block(dense, index)
        known = 2 * float(b.square().sum() - b.diagonal().square().sum()) / count
        values = torch.tensor([e[name].trace for e in estimates])
        sems = torch.tensor([e[name].trace_sem for e in estimates])
        assert all(e[name].num_block_probes == count for e in estimates)
        assert abs(float(values.mean() - b.trace())) <= 5 * math.sqrt(known / repeats)
        # Variance of 100 estimates: good to 14 %.
        assert float(values.var()) / known == pytest.approx(1, abs=0.5)
        widened = widened_sem(1.0, count) ** 2
        assert float(sems.square().mean()) / known == pytest.approx(widened, rel=0.3)


def test_block_probes_are_taken_where_the_others_noise_dominates_and_only_there() -> None:
    torch.manual_seed(2)
    # Two layers that share much and one that shares nothing with them.
    module = nn.ParameterDict({k: nn.Parameter(torch.randn(8).double()) for k in ("a", "b", "c")})
    mix = torch.randn(8, 8).double()

    def loss(m: nn.ParameterDict, batch: Tensor) -> Tensor:
        coupled = 10 * m["a"] @ mix @ m["b"]
        alone = (m["c"] @ (mix + mix.T) @ m["c"]) * 3
        return coupled + alone + 0.01 * ((m["a"] ** 4).sum() + (m["b"] ** 4).sum())

    report = measure_hessian(
        module, [torch.zeros(1)], loss=loss, num_steps=2, num_probes=20, num_layer_probes=10
    )
    assert report.layers["a"].num_block_probes == 10
    assert report.layers["a"].trace == pytest.approx(
        0.12 * float(module["a"].detach().square().sum())
    )
    assert report.layers["c"].num_block_probes == 0
    # The pilot is paid for everywhere.
    assert report.layers["c"].num_matvecs == PILOT_PROBES
    assert report.num_block_matvecs == 10 + 10 + PILOT_PROBES


def test_costs_are_as_stated() -> None:
    module, batches, loss = CASES[0].build()
    plain = measure_hessian(module, batches, loss=loss, num_steps=5, num_probes=7)
    settings = {"num_steps": 5, "num_probes": 7, "num_runs": 3, "num_layer_steps": 4}
    spectra = measure_hessian(module, batches, loss=loss, **settings)  # type: ignore[arg-type]
    assert (plain.num_matvecs, plain.num_block_matvecs) == (12, 0)
    assert spectra.num_block_matvecs == 2 * 3 * 4
    assert spectra.num_matvecs == 3 * 5 + 5 + 2 * 3 * 4
    layer = next(iter(spectra.layers.values())).spectrum
    assert layer is not None
    assert layer.run_sizes == (4, 4, 4)
    assert float(layer.weights.sum()) == pytest.approx(1)
    assert HessianSettings(**settings).layer_plan.max_matvecs == 3 * 4  # type: ignore[arg-type]
    # Start vectors of further runs are probes too, at no further product.
    more = HessianSettings(**settings, num_layer_probes=9).layer_plan  # type: ignore[arg-type]
    assert more.max_matvecs == 3 * 4 + 9 - 2
    assert HessianSettings().layer_plan.max_matvecs == 0
    probed = measure_hessian(module, batches, loss=loss, **settings, num_layer_probes=4)  # type: ignore[arg-type]
    assert probed.num_block_matvecs == 2 * (3 * 4 + 4 - 2)


def test_a_layers_numbers_do_not_depend_on_which_others_are_chosen() -> None:
    module, batches, loss = CASES[0].build()
    settings = {"num_layer_steps": 4, "num_layer_probes": 6}
    every = measure_hessian(module, batches, loss=loss, **settings).layers["2"]  # type: ignore[arg-type]
    alone = measure_hessian(module, batches, loss=loss, layers="2", **settings).layers["2"]  # type: ignore[arg-type]
    assert every.spectrum is not None
    assert alone.spectrum is not None
    assert torch.equal(every.spectrum.nodes, alone.spectrum.nodes)
    assert every.trace == pytest.approx(alone.trace, rel=1e-12)


def test_what_belongs_to_no_layer_is_said() -> None:
    module, batches, loss = CASES[0].build()
    report = measure_hessian(module, batches, loss=loss, layers=["2"], num_steps=5)
    assert report.unlayered == ("0.weight", "0.bias")
    assert "25 of 43 parameters belong to no chosen layer" in report.summary()
    assert measure_hessian(module, batches, loss=loss, num_steps=5).unlayered == ()


def test_a_layer_without_curvature_has_no_distance() -> None:
    module, batches, _ = UNUSED.build()
    report = measure_hessian(
        module, batches, loss=loss_with_linear_part, num_steps=15, num_layer_steps=5
    )
    for name in ("unused", "linear"):
        spectrum = report.layers[name].spectrum
        assert spectrum is not None
        assert (spectrum.lambda_max, spectrum.lambda_min) == (0, 0)
        assert math.isnan(spectrum.distance)
        assert math.isnan(spectrum.published_distance)


def test_norms_and_what_growing_weights_do() -> None:
    case = CASES[5]
    module, batches, loss = case.build()
    module[0].bias.data.zero_()
    module[1].eps = 0.0
    # torch's own kernel wants eps to be positive, so that nothing is compared with it.
    plain = measure_hessian(module, batches, loss=loss, num_steps=60, check=False)
    weight = module[0].weight.detach().clone()
    assert plain.layers["0"].norm == pytest.approx(float(weight.norm()), rel=1e-12)
    squares = sum(layer.norm**2 for layer in plain.layers.values())
    assert plain.weight_norm == pytest.approx(math.sqrt(squares), rel=1e-12)
    assert plain.trace_times_norm2 == pytest.approx(plain.trace * squares, rel=1e-12)
    module[0].weight.data.mul_(3)
    grown = measure_hessian(module, batches, loss=loss, num_steps=60, check=False)
    # The same function; the trace falls as if it had become flat.
    assert grown.loss == pytest.approx(plain.loss, rel=1e-12)
    assert grown.layers["0"].trace == pytest.approx(plain.layers["0"].trace / 9, rel=1e-6)
    assert grown.layers["0"].trace_times_norm2 == pytest.approx(
        plain.layers["0"].trace_times_norm2, rel=1e-6
    )


@pytest.mark.parametrize("name", ["num_layer_steps", "num_layer_probes"])
@pytest.mark.parametrize("value", [1, -1, 2.0, True, None])
def test_wrong_numbers_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{name} is {value}; give .* at least 2, or 0 for none"):
        HessianSettings(**{name: value})  # type: ignore[arg-type]

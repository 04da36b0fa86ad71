"""The whole measurement against dense references, on every case."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lla_callbacks import measure_hessian
from lla_callbacks.hessian.settings import HessianSettings
from lla_callbacks.linalg.eigenvalue import Eigenvalue
from lla_callbacks.linalg.probes import generator, rademacher
from tests.cases import (
    CASES,
    UNUSED,
    Case,
    cross_entropy,
    dense_hessian,
    loss_with_linear_part,
    tanh_net,
    trainable,
)

# Central differences of float64 gradients are right to about this, for these networks.
TOLERANCE = 2e-7


def dense_of(case: Case) -> tuple[Tensor, nn.Module]:
    module, batches, loss = case.build()
    return dense_hessian(module, batches, loss, case.mode), module


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_everything_agrees_with_the_dense_hessian(case: Case) -> None:
    dense, _ = dense_of(case)
    module, batches, loss = case.build()
    dim = len(dense)
    report = measure_hessian(
        module, batches, loss=loss, mode=case.mode, num_steps=dim, num_probes=3
    )
    exact = torch.linalg.eigvalsh(dense)
    norm = float(exact.abs().max())
    tolerance = TOLERANCE * max(norm, 1)
    assert report.num_params == dim
    assert report.num_samples == sum(case.batch_sizes)
    assert abs(report.lambda_max - float(exact[-1])) <= tolerance + report.lambda_max.residual
    assert abs(report.lambda_min - float(exact[0])) <= tolerance + report.lambda_min.residual
    # At full depth nothing is left to chance, and the reported errors say so.
    assert abs(report.trace - float(dense.trace())) <= dim * tolerance + 5 * report.trace_sem
    assert report.trace_sem < 1e-6 * max(norm, 1)
    sizes = {name: p.numel() for name, p in trainable(module).items()}
    offset, expected = 0, {}
    for name, size in sizes.items():
        layer = name.rpartition(".")[0] or name
        part = dense.diagonal()[offset : offset + size].sum()
        expected[layer] = expected.get(layer, 0.0) + float(part)
        offset += size
    assert list(report.layer_traces) == list(expected)
    for layer, (value, sem) in report.layer_traces.items():
        assert abs(value - expected[layer]) <= dim * tolerance + 5 * sem
    # Moments of the spectral density, as the start vector sees them.
    start = rademacher(dim, generator(0), dtype=torch.float64, device=torch.device("cpu"))
    for power in (1, 2, 3):
        moment = float(start @ torch.linalg.matrix_power(dense, power) @ start) / dim
        found = float((report.weights * report.nodes**power).sum())
        assert abs(found - moment) <= 10 * dim * TOLERANCE * max(norm, 1) ** power
    assert float(report.weights.sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_criteria_agree_with_the_dense_spectrum(case: Case) -> None:
    dense, _ = dense_of(case)
    module, batches, loss = case.build()
    dim = len(dense)
    report = measure_hessian(
        module, batches, loss=loss, mode=case.mode, num_steps=dim, num_probes=3
    )
    values, vectors = torch.linalg.eigh(dense)
    start = rademacher(dim, generator(0), dtype=torch.float64, device=torch.device("cpu"))
    weights = (vectors.T @ start) ** 2 / dim
    found = report.criteria
    assert found["r_e"] == pytest.approx(abs(float(values[0] / values[-1])), rel=1e-4, abs=1e-6)
    assert found["c_t"] == pytest.approx(float(values[0] / values[-1]), rel=1e-4, abs=1e-6)
    clear = values.abs() > 1e-5 * values.abs().max()
    negative, positive = clear & (values < 0), clear & (values > 0)
    mass = values.abs() * weights
    ratio = float(mass[negative].sum() / mass[positive].sum())
    assert found["kh1"] == pytest.approx(ratio, rel=1e-3, abs=1e-5)
    assert found["frobenius_norm"] == pytest.approx(float(dense.norm()), rel=1e-5)
    norm = float(values.abs().max())
    assert found["stable_rank"] == pytest.approx(float(dense.norm() / norm) ** 2, rel=1e-5)
    plus = values.clamp(min=0)
    effective = dim * float((weights * plus / (plus + 1)).sum())
    assert found["effective_dimension"] == pytest.approx(effective, rel=1e-4)
    assert found["eigenvalue_ratio"] == pytest.approx(float(values[-1] / values[-5]), rel=1e-4)
    module, batches, loss = case.build()
    gradient = _gradient(module, batches, loss, case.mode)
    share = float((vectors[:, -5:].T @ gradient).square().sum() / gradient.square().sum())
    assert found["gradient_share"] == pytest.approx(share, rel=1e-4, abs=1e-6)
    assert math.isnan(found["stability"])


def _gradient(module, batches, loss, mode) -> Tensor:
    from lla_callbacks.objective.objective import Objective

    return Objective(module, batches, loss, mode=mode).hessian().gradient


def test_kh05_agrees_at_full_depth_where_eigenvalues_are_apart() -> None:
    module, batches, loss = CASES[0].build()
    dense = dense_hessian(module, batches, loss, "batch")
    values, vectors = torch.linalg.eigh(dense)
    start = rademacher(len(dense), generator(0), dtype=torch.float64, device=torch.device("cpu"))
    weights = (vectors.T @ start) ** 2 / len(dense)
    root = (values.abs() * weights).sqrt()
    # Softmax is shift-invariant: a few eigenvalues are zero and belong to neither side.
    clear = values.abs() > 1e-6 * values.abs().max()
    expected = float(root[clear & (values < 0)].sum() / root[clear & (values > 0)].sum())
    report = measure_hessian(module, batches, loss=loss, num_steps=len(dense))
    assert report.criteria["kh05"] == pytest.approx(expected, rel=1e-3)


def test_unused_parameters_have_zero_rows() -> None:
    module, batches, _ = UNUSED.build()
    report = measure_hessian(module, batches, loss=loss_with_linear_part, num_steps=30)
    assert report.layer_traces["unused"].value == pytest.approx(0, abs=1e-12)
    assert report.layer_traces["linear"].value == pytest.approx(0, abs=1e-12)
    assert report.num_params == 15 + 6 + 3


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("case", [CASES[0], CASES[5]], ids=["tanh", "batch norm"])
def test_errors_cover_the_truth_at_ordinary_depth(case: Case, seed: int) -> None:
    dense, _ = dense_of(case)
    module, batches, loss = case.build()
    report = measure_hessian(
        module, batches, loss=loss, mode=case.mode, num_steps=8, num_probes=10, seed=seed
    )
    exact = torch.linalg.eigvalsh(dense)
    for found in (report.lambda_max, report.lambda_min):
        assert float((exact - found).abs().min()) <= found.residual + TOLERANCE * 10
    assert abs(report.trace - float(dense.trace())) <= 5 * report.trace_sem
    for value, sem in report.layer_traces.values():
        assert sem > 0
        assert math.isfinite(value)
    total = sum(value for value, _ in report.layer_traces.values())
    assert total == pytest.approx(report.trace, rel=1e-9)


@pytest.mark.parametrize("change", [{"chunk_size": 5}, {"microbatch_size": 3}])
def test_chunks_and_microbatches_change_nothing(change: dict[str, int]) -> None:
    module, batches, loss = CASES[2].build()
    plain = measure_hessian(module, batches, loss=loss, num_steps=6, num_probes=4)
    other = measure_hessian(module, batches, loss=loss, num_steps=6, num_probes=4, **change)
    assert other.lambda_max == pytest.approx(plain.lambda_max, rel=1e-10)
    assert other.trace == pytest.approx(plain.trace, rel=1e-10)
    assert other.num_matvecs == plain.num_matvecs


def test_batches_weigh_by_their_samples() -> None:
    module, batches, loss = CASES[2].build()
    joined = tuple(torch.cat([b[i] for b in batches]) for i in (0, 1))
    apart = measure_hessian(module, batches, loss=loss, num_steps=6)
    together = measure_hessian(module, [joined], loss=loss, num_steps=6)
    assert apart.lambda_max == pytest.approx(together.lambda_max, rel=1e-10)
    assert apart.loss == pytest.approx(together.loss, rel=1e-12)


def test_float32_agrees_with_float64() -> None:
    module, batches, loss = CASES[0].build()
    double = measure_hessian(module, batches, loss=loss, num_steps=10)
    single = measure_hessian(
        module.float(), [(x.float(), y) for x, y in batches], loss=loss, num_steps=10
    )
    assert (double.precision, single.precision) == ("float64", "float32")
    assert single.lambda_max == pytest.approx(double.lambda_max, rel=1e-5)
    assert single.trace == pytest.approx(double.trace, rel=1e-3)


def test_scaling_the_loss_scales_the_spectrum() -> None:
    module, batches, loss = CASES[0].build()
    plain = measure_hessian(module, batches, loss=loss, num_steps=10)
    scaled = measure_hessian(module, batches, loss=lambda m, b: 7 * loss(m, b), num_steps=10)
    assert scaled.lambda_max == pytest.approx(7 * plain.lambda_max, rel=1e-9)
    assert scaled.trace == pytest.approx(7 * plain.trace, rel=1e-9)
    for same in ("r_e", "kh05", "kh1", "negative_mass", "stable_rank", "gradient_share"):
        assert scaled.criteria[same] == pytest.approx(plain.criteria[same], rel=1e-6)


def test_growing_weights_before_a_norm_divide_the_trace_and_not_the_scaled_one() -> None:
    torch.manual_seed(2)
    module = nn.Sequential(
        nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4, eps=1e-14, affine=False), nn.Tanh()
    ).double()
    batch = (torch.randn(8, 3).double(), torch.randint(0, 4, (8,)))
    small = measure_hessian(module, [batch], loss=cross_entropy, num_steps=12, num_probes=2)
    with torch.no_grad():
        module[0].weight.mul_(3)
    large = measure_hessian(module, [batch], loss=cross_entropy, num_steps=12, num_probes=2)
    assert large.trace == pytest.approx(small.trace / 9, rel=1e-6)
    assert large.trace_times_norm2 == pytest.approx(small.trace_times_norm2, rel=1e-6)
    weight = float(module[0].weight.detach().square().sum())
    assert large.trace_times_norm2 == pytest.approx(large.trace * weight)


def test_the_seed_decides_and_the_global_stream_does_not() -> None:
    module, batches, loss = CASES[0].build()
    first = measure_hessian(module, batches, loss=loss, num_steps=5, seed=3)
    torch.manual_seed(99)
    again = measure_hessian(module, batches, loss=loss, num_steps=5, seed=3)
    other = measure_hessian(module, batches, loss=loss, num_steps=5, seed=4)
    assert (first.trace, first.lambda_max) == (again.trace, again.lambda_max)
    assert first.trace != other.trace


def test_cost_is_as_stated_and_probes_of_further_runs_are_free() -> None:
    module, batches, loss = CASES[0].build()
    one = measure_hessian(module, batches, loss=loss, num_steps=5, num_probes=7)
    three = measure_hessian(module, batches, loss=loss, num_steps=5, num_probes=7, num_runs=3)
    assert one.num_matvecs == 5 + 7 == HessianSettings(num_steps=5, num_probes=7).max_matvecs
    assert three.num_matvecs == 3 * 5 + 5
    assert three.num_probes == 7
    assert three.run_sizes == (5, 5, 5)
    assert len(three.nodes) == 15
    assert float(three.weights.sum()) == pytest.approx(1)


def test_wanted_accuracy_stops_early() -> None:
    module, batches, loss = CASES[0].build()
    loose = measure_hessian(
        module, batches, loss=loss, num_steps=40, num_probes=500, eig_rtol=0.05, trace_rtol=0.2
    )
    assert loose.num_steps < 40
    assert loose.num_probes < 500
    assert loose.trace_sem <= 0.2 * abs(loose.trace)
    worst = max(loose.lambda_max.residual, loose.lambda_min.residual)
    assert worst <= 0.05 * max(abs(loose.lambda_max), abs(loose.lambda_min))


def test_only_the_first_samples_are_taken_where_that_is_asked() -> None:
    module, _, loss = CASES[0].build()

    def endless():
        while True:
            yield torch.randn(4, 4, dtype=torch.float64), torch.randint(0, 3, (4,))

    report = measure_hessian(module, endless(), loss=loss, num_steps=3, num_samples=10)
    assert report.num_samples == 12


def test_a_coarse_model_reports_coarse_errors() -> None:
    module, batches, loss = CASES[0].build()
    coarse = [(x.bfloat16(), y) for x, y in batches]
    report = measure_hessian(
        module.bfloat16(), coarse, loss=loss, num_steps=10, precision="training"
    )
    assert report.precision == "bfloat16"
    assert report.lambda_max.residual >= 0.01 * report.lambda_max


def test_layers_can_be_chosen() -> None:
    module, batches, loss = CASES[0].build()
    report = measure_hessian(module, batches, loss=loss, layers=["2"], num_steps=5)
    everything = measure_hessian(module, batches, loss=loss, num_steps=5)
    assert list(report.layer_traces) == ["2"]
    assert report.layer_traces["2"].value == pytest.approx(everything.layer_traces["2"].value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 1}, "num_steps is 1; give a whole number of at least 2"),
        ({"num_steps": 2.0}, "num_steps is 2.0"),
        ({"num_probes": True}, "num_probes is True"),
        ({"num_runs": 0}, "num_runs is 0"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"eig_rtol": 2.0}, "eig_rtol is 2.0; give a number between 0 and 1"),
        ({"trace_rtol": "x"}, "trace_rtol is 'x'"),
        ({"layers": 2}, "layers is 2; give a module path or pattern"),
        ({"layers": ["nowhere"]}, r"'nowhere', which matches no module .* are: 0, 2"),
        ({"mode": "train"}, "mode is 'train'; give one of batch, eval"),
        ({"mode": "eval", "dropout": True}, "dropout is True in mode 'eval'"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"microbatch_size": 0}, "microbatch_size is 0"),
        ({"batches": []}, "no batch to measure on"),
    ],
)
def test_bad_settings_name_what_was_given_and_what_is_allowed(
    settings: dict[str, object], message: str
) -> None:
    module, batches, loss = CASES[0].build()
    with pytest.raises(ValueError, match=message):
        measure_hessian(module, **{"batches": batches, "loss": loss, **settings})  # type: ignore[arg-type]


def test_a_module_without_a_loss_is_told_how_to_give_one() -> None:
    with pytest.raises(TypeError, match=r"no training_step.*loss=lambda module, batch"):
        measure_hessian(tanh_net(), [torch.ones(2, 4)])


def test_a_module_with_nothing_to_train_is_refused() -> None:
    module = tanh_net().requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        measure_hessian(module, [(torch.ones(2, 4), torch.zeros(2).long())], loss=cross_entropy)


def test_an_eigenvalue_is_a_number_with_a_residual() -> None:
    import copy
    import pickle

    value = Eigenvalue(2.5, 0.1, arithmetic=0.05)
    assert value + 1 == 3.5
    for twin in (copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
        assert (twin, twin.residual, twin.arithmetic) == (2.5, 0.1, 0.05)
    assert "residual 0.1" in repr(value)


class LeNet(nn.Module):
    """The network of LLA's published example: LeNet-5 with ReLU and max-pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        pool = nn.functional.max_pool2d
        x = pool(torch.relu(self.conv1(x)), 2)
        x = pool(torch.relu(self.conv2(x)), 2).flatten(1)
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


def test_the_published_lenet_gives_the_published_numbers(data_folder) -> None:
    import gzip

    import numpy as np

    raw = gzip.decompress((data_folder / "mnist" / "t10k-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((data_folder / "mnist" / "t10k-labels-idx1-ubyte.gz").read_bytes())
    count = 2048
    images = np.frombuffer(raw, np.uint8, offset=16)[: count * 784].reshape(count, 1, 28, 28)
    x = torch.tensor(images / 255.0, dtype=torch.float32)
    y = torch.tensor(np.frombuffer(labels, np.uint8, offset=8)[:count].astype(np.int64))
    module = LeNet()
    weights = data_folder / "pretrained" / "lla_lenet_example.pth"
    module.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    report = measure_hessian(
        module, [(x, y)], loss=cross_entropy, num_steps=25, num_probes=6, microbatch_size=512
    )
    # Published: r_e 0.028126, lambda_1 9.6001 by power iteration stopped at 1e-3, trace
    # 56.903 by probes stopped at a 1e-3 move, so without a known error.
    assert report.criteria["r_e"] == pytest.approx(0.028126, rel=1e-3)
    assert report.lambda_max == pytest.approx(9.6001, rel=2e-3)
    assert report.trace == pytest.approx(56.903, rel=0.06)

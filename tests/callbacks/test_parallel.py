"""Two real processes measure one Hessian: equal to one process, and they fail together."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.nn.functional import cross_entropy

from lla_callbacks import HessianMonitor, LossLandscapeMonitor, measure_hessian

from .modules import differences
from .parallel_worker import SETTINGS, Net, Sharded

ROOT = Path(__file__).parents[2]


def run(folder, case, *, check=True, timeout=240):
    """Train in two processes and return what each found."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(_free_port())}
    done = subprocess.run(
        [sys.executable, "-m", "tests.callbacks.parallel_worker", str(folder), case],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    if not check:
        return done
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [torch.load(folder / f"{case}_{rank}.pt", weights_only=True) for rank in (0, 1)]


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def alone(module, weights, *, engine="exact", **settings):
    """Return the report of one process over the union of both processes' held batches."""
    source = torch.Generator().manual_seed(7)
    x = torch.randn(36, 3, generator=source, dtype=torch.float64)
    y = (x.sum(1) > 0).long()
    # Process r trains on samples r, r + 2, r + 4, ... in batches of four.
    rows = [list(range(r + 8 * k, r + 8 * k + 8, 2)) for r in (0, 1) for k in range(2)]
    module.load_state_dict(weights)
    return measure_hessian(
        module,
        [(x[r], y[r]) for r in rows],
        loss=lambda module, batch: cross_entropy(module.net(batch[0]), batch[1]),
        num_steps=SETTINGS["num_steps"],
        num_probes=SETTINGS["num_probes"],
        engine=engine,
        **settings,
    )


def assert_same(found, report, rtol):
    assert found["num_samples"] == report.num_samples == 16
    for name in ("loss", "trace", "trace_sem", "gradient_norm"):
        assert found[name] == pytest.approx(getattr(report, name), rel=rtol), name
    assert found["lambda_max"] == pytest.approx(float(report.lambda_max), rel=rtol)
    assert found["lambda_min"] == pytest.approx(float(report.lambda_min), rel=rtol)
    assert found["kh05"] == pytest.approx(report.criteria["kh05"], rel=100 * rtol)
    for layer, trace in found["layers"].items():
        assert trace == pytest.approx(report.layers[layer].trace, rel=rtol, abs=rtol), layer


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    return run(tmp_path_factory.mktemp("without"), "without")


@pytest.mark.parametrize("case", ["ddp", "static", "views", "unused"])
def test_ddp_measures_as_one_process_over_the_union_and_leaves_training_alone(
    tmp_path, without, case
):
    both = run(tmp_path, case)
    for one, other in zip(*(each["reports"].values() for each in both), strict=True):
        # NaN (Adam has no limit for what it has not moved) is not equal to itself.
        assert {**one, "stability": 0} == {**other, "stability": 0}
    assert list(both[0]["reports"]) == [0, 4, 8, 10]
    assert both[0]["warnings"] == both[1]["warnings"] == []
    report = alone(Net(unused=case == "unused"), both[0]["weights"])
    assert_same(both[0]["reports"][10], report, rtol=1e-9)
    for one, other in zip(both, without, strict=True):
        weights = {n: t for n, t in one["weights"].items() if not n.startswith("unused")}
        assert differences(weights, other["weights"]) == []
        assert torch.equal(one["random"], other["random"])


def test_layers_and_differences_are_shared_too(tmp_path):
    layers = run(tmp_path, "layers")
    settings = {"num_layer_steps": 3, "num_layer_probes": 3}
    report = alone(Net(), layers[0]["weights"], **settings)
    assert_same(layers[0]["reports"][10], report, rtol=1e-8)
    by_difference = run(tmp_path, "difference")
    assert by_difference[0]["reports"][10]["engine"] == "difference"
    assert_same(by_difference[1]["reports"][10], alone(Net(), layers[0]["weights"]), rtol=1e-5)


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("fails_at0", "process 1 failed.*the second process is unwell"),
        ("fails_at1", "process 1 failed.*the second process is unwell"),
        ("fails_at2", "process 1 failed.*the second process is unwell"),
        ("fails_in_product", "process 1 failed.*the second process is unwell"),
        ("fails_outside", "the bar is broken"),
    ],
)
def test_a_process_that_fails_takes_the_other_into_the_same_gap(tmp_path, without, case, why):
    both = run(tmp_path, case)
    # Where the loss fails for good, all later firings are gaps too.
    assert (0 if case == "fails_at0" else 4) not in both[0]["reports"]
    assert list(both[0]["reports"]) == list(both[1]["reports"])
    assert len(both[0]["warnings"]) == 1
    assert re.search(why, both[0]["warnings"][0])
    for one, other in zip(both, without, strict=True):
        assert differences(one["weights"], other["weights"]) == []


def test_light_measurements_are_shared_too(tmp_path, without):
    both = run(tmp_path, "tracking")
    assert both[0]["tracked"] == both[1]["tracked"]
    assert {5, 6, 7, 9} <= set(both[0]["tracked"])
    # Full measurements of the same weights as without light ones in between.
    assert list(both[0]["reports"]) == [0, 4, 8, 10]
    for one, other in zip(both, without, strict=True):
        assert differences(one["weights"], other["weights"]) == []


def test_a_budget_is_kept_alike(tmp_path):
    both = run(tmp_path, "budget")
    assert list(both[0]["reports"]) == list(both[1]["reports"])


def test_a_killed_process_ends_the_run_as_it_would_have(tmp_path):
    done = run(tmp_path, "killed", check=False)
    assert done.returncode != 0
    assert not (tmp_path / "killed_0.pt").exists()


def test_fsdp2_measures_by_differences_as_one_process(tmp_path):
    both = run(tmp_path, "fsdp")
    assert list(both[0]["reports"]) == [0, 4, 8, 10]
    assert (
        both[0]["reports"] == both[1]["reports"] or both[0]["reports"][4] == both[1]["reports"][4]
    )
    last = both[0]["reports"][10]
    assert last["engine"] == "difference"
    assert "sharded" in last["reason"]
    assert last["gaps"] == {}
    assert_same(last, alone(Sharded(), both[0]["weights"]), rtol=1e-5)
    bare = run(tmp_path, "fsdp_without")
    for one, other in zip(both, bare, strict=True):
        assert differences(one["weights"], other["weights"]) == []
        assert torch.equal(one["random"], other["random"])


def test_a_measurement_that_fails_under_fsdp2_leaves_training_alone(tmp_path):
    both, bare = run(tmp_path, "fsdp_fails"), run(tmp_path, "fsdp_without")
    assert 0 in both[0]["reports"]
    assert 4 not in both[0]["reports"]
    for one, other in zip(both, bare, strict=True):
        # The gathered weights of a sharded part were moved when the loss failed.
        assert differences(one["weights"], other["weights"]) == []


def test_the_exact_engine_is_refused_for_sharded_parameters(tmp_path):
    done = run(tmp_path, "fsdp_exact", check=False)
    assert done.returncode != 0
    assert "give engine='difference' or 'auto'" in done.stderr + done.stdout


def test_tensor_parallelism_measures_exactly(tmp_path):
    both = run(tmp_path, "tensor")
    last = both[0]["reports"][18]
    assert last["engine"] == "exact"
    bare = run(tmp_path, "tensor_without")
    for one, other in zip(both, bare, strict=True):
        assert differences(one["weights"], other["weights"]) == []
    module = Sharded()
    module.load_state_dict(both[0]["weights"])
    source = torch.Generator().manual_seed(7)
    x = torch.randn(36, 3, generator=source, dtype=torch.float64)
    y = (x.sum(1) > 0).long()
    report = measure_hessian(
        module,
        [(x[i : i + 4], y[i : i + 4]) for i in range(0, 16, 4)],
        loss=lambda module, batch: cross_entropy(module.net(batch[0]), batch[1]),
        num_steps=SETTINGS["num_steps"],
        num_probes=SETTINGS["num_probes"],
    )
    assert_same(last, report, rtol=1e-9)


class Stub:
    """A Trainer with a strategy of some name."""

    def __init__(self, strategy):
        self.strategy = type(strategy, (), {})()
        self.callbacks, self.world_size, self.barebones = [], 2, False


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy"])
@pytest.mark.parametrize("kind", [HessianMonitor, LossLandscapeMonitor])
def test_strategies_with_shards_of_their_own_are_refused_with_the_remedy(strategy, kind):
    with pytest.raises(MisconfigurationException, match=rf"{strategy}.*fully_shard \(FSDP2\)"):
        kind().setup(Stub(strategy), Net(), "fit")


def test_slices_refuse_spread_parameters():
    with pytest.raises(MisconfigurationException, match=r"moves whole parameters.*Train with DDP"):
        LossLandscapeMonitor().setup(Stub("ModelParallelStrategy"), Net(), "fit")

"""Two real processes measure one Hessian: equal to one process, and they fail together."""

import re
from functools import partial

import pytest
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.nn.functional import cross_entropy

from lla_callbacks import (
    HessianMonitor,
    HessianTraceRegularizer,
    LossLandscapeMonitor,
    basin_radii,
    convexity_map,
    loss_line,
    loss_plane,
    measure_hessian,
)
from lla_callbacks.objective.grid import centred

from .by_hand import noise, train_by_hand
from .modules import differences
from .parallel_worker import SETTINGS, Net, Sharded
from .two_processes import environment, in_two, run

FAILURES = {
    "fails_at0": "process 1 failed.*the second process is unwell",
    "fails_at1": "process 1 failed.*the second process is unwell",
    "fails_at2": "process 1 failed.*the second process is unwell",
    "fails_in_product": "process 1 failed.*the second process is unwell",
    "fails_outside": "the bar is broken",
}
DDP = ["ddp", "static", "views", "unused"]
WHOLE = ["without", *DDP, "layers", "difference", "tracking", "budget", *FAILURES]
NOISE = [f"{kind}_noise{more}" for kind in ("tensor", "fsdp", "flat") for more in ("", "_relative")]
SHARDED = [
    "tensor_without", "tensor", "tensor_slices",
    "fsdp_without", "fsdp_exact", "fsdp", "fsdp_fails", "fsdp_slices", *NOISE,
    "fsdp_policy_without", "fsdp_policy", "fsdp_policy_slices",
]  # fmt: skip
WORKER = "tests.callbacks.parallel_worker"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes with whole weights found, case by case."""
    return in_two(tmp_path_factory.mktemp("whole"), WORKER, WHOLE)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """What each of two processes with a part of the weights found, case by case."""
    return in_two(tmp_path_factory.mktemp("sharded"), WORKER, SHARDED)


@pytest.mark.parametrize("pair", ["found", "sharded"])
def test_both_processes_end_well(request, pair):
    pair = request.getfixturevalue(pair)
    assert pair.codes == [0, 0], pair.output


def held(num_batches=2):
    """Return the union of both processes' held batches, so many of each."""
    source = torch.Generator().manual_seed(7)
    x = torch.randn(36, 3, generator=source, dtype=torch.float64)
    y = (x.sum(1) > 0).long()
    # Process r trains on samples r, r + 2, r + 4, ... in batches of four.
    ranges = [range(r + 8 * k, min(36, r + 8 * k + 8), 2) for r in (0, 1) for k in range(5)]
    rows = [list(r) for k, r in enumerate(ranges) if k % 5 < num_batches]
    return [(x[r], y[r]) for r in rows]


def whole_batches(count):
    """Return the first batches of training where all processes train on the same ones."""
    source = torch.Generator().manual_seed(7)
    x = torch.randn(36, 3, generator=source, dtype=torch.float64)
    y = (x.sum(1) > 0).long()
    return [(x[i : i + 4], y[i : i + 4]) for i in range(0, 4 * count, 4)]


def loss_of(module, batch):
    return cross_entropy(module.net(batch[0]), batch[1])


def alone(module, weights, *, engine="exact", num_batches=2, **settings):
    """Return the report of one process over the union of both processes' held batches."""
    module.load_state_dict(weights)
    return measure_hessian(
        module,
        held(num_batches),
        loss=loss_of,
        num_steps=SETTINGS["num_steps"],
        num_probes=SETTINGS["num_probes"],
        engine=engine,
        **settings,
    )


def assert_same(found, report, rtol):
    assert found["num_samples"] == report.num_samples
    for name in ("loss", "trace", "trace_sem", "gradient_norm"):
        assert found[name] == pytest.approx(getattr(report, name), rel=rtol), name
    assert found["lambda_max"] == pytest.approx(float(report.lambda_max), rel=rtol)
    assert found["lambda_min"] == pytest.approx(float(report.lambda_min), rel=rtol)
    assert found["kh05"] == pytest.approx(report.criteria["kh05"], rel=100 * rtol)
    for layer, trace in found["layers"].items():
        assert trace == pytest.approx(report.layers[layer].trace, rel=rtol, abs=rtol), layer


@pytest.mark.parametrize("case", DDP)
def test_ddp_measures_as_one_process_over_the_union_and_leaves_training_alone(found, case):
    both = found(case)
    for one, other in zip(*(each["reports"].values() for each in both), strict=True):
        # NaN (Adam has no limit for what it has not moved) is not equal to itself.
        assert {**one, "stability": 0} == {**other, "stability": 0}
    assert list(both[0]["reports"]) == [0, 4, 8, 10]
    assert both[0]["warnings"] == both[1]["warnings"] == []
    # Each holds its half of every basis vector, but for vectors that are told to stay whole.
    num_params = sum(
        t.numel() for n, t in both[0]["weights"].items() if n.endswith(("weight", "bias"))
    )
    halves = [0, 0] if case == "static" else [-(-num_params // 2), num_params // 2]
    assert [each["held"] for each in both] == halves
    report = alone(Net(unused=case == "unused"), both[0]["weights"])
    assert_same(both[0]["reports"][10], report, rtol=1e-9)
    for one, other in zip(both, found("without"), strict=True):
        weights = {n: t for n, t in one["weights"].items() if not n.startswith("unused")}
        assert differences(weights, other["weights"]) == []
        assert torch.equal(one["random"], other["random"])


def test_layers_and_differences_are_shared_too(found):
    layers = found("layers")
    settings = {"num_layer_steps": 2, "num_layer_probes": 2}
    report = alone(Net(), layers[0]["weights"], **settings)
    assert_same(layers[0]["reports"][10], report, rtol=1e-8)
    by_difference = found("difference")
    assert by_difference[0]["reports"][10]["engine"] == "difference"
    assert_same(by_difference[1]["reports"][10], alone(Net(), layers[0]["weights"]), rtol=1e-5)


@pytest.mark.parametrize("case", FAILURES)
def test_a_process_that_fails_takes_the_other_into_the_same_gap(found, case):
    both = found(case)
    # Where the loss fails for good, all later firings are gaps too.
    assert (0 if case == "fails_at0" else 4) not in both[0]["reports"]
    assert list(both[0]["reports"]) == list(both[1]["reports"])
    assert len(both[0]["warnings"]) == 1
    assert re.search(FAILURES[case], both[0]["warnings"][0])
    for one, other in zip(both, found("without"), strict=True):
        assert differences(one["weights"], other["weights"]) == []


def test_light_measurements_are_shared_too(found):
    both = found("tracking")
    assert both[0]["tracked"] == both[1]["tracked"]
    assert {5, 6, 7, 9} <= set(both[0]["tracked"])
    # Full measurements of the same weights as without light ones in between.
    assert list(both[0]["reports"]) == [0, 4, 8, 10]
    for one, other in zip(both, found("without"), strict=True):
        assert differences(one["weights"], other["weights"]) == []


def test_a_budget_is_kept_alike(found):
    both = found("budget")
    assert list(both[0]["reports"]) == list(both[1]["reports"])


def test_a_killed_process_ends_the_run_as_it_would_have(tmp_path):
    # Started by Lightning, whose observer ends what is left.
    (code,), _ = run([tmp_path / "output.txt"], WORKER, [tmp_path, "killed"], [environment()])
    assert code not in (0, None)
    assert not (tmp_path / "killed_0.pt").exists()


def test_fsdp2_measures_by_differences_as_one_process(sharded):
    both = sharded("fsdp")
    # The start is measured late, once all batches are there: on its own weights, as one process.
    assert list(both[0]["reports"]) == [0, 10]
    assert both[0]["reports"][10] == both[1]["reports"][10]
    last = both[0]["reports"][10]
    assert last["engine"] == "difference"
    assert "sharded" in last["reason"]
    assert last["gaps"] == {}
    # Batches of unequal sizes, ten in all.
    settings = {"num_layer_steps": 2, "num_layer_probes": 2, "num_batches": 5}
    assert_same(last, alone(Sharded(), both[0]["weights"], **settings), rtol=1e-5)
    # Vectors live in the shards: together they are one.
    assert sum(each["held"] for each in both) == sum(t.numel() for t in both[0]["weights"].values())
    bare = sharded("fsdp_without")
    for one, other in zip(both, bare, strict=True):
        assert differences(one["weights"], other["weights"]) == []
        assert torch.equal(one["random"], other["random"])


def in_float32(both, *most):
    """Return the bare network with the weights of two processes, and their batches."""
    module = Sharded().float()
    module.load_state_dict(both[0]["weights"])
    return module, [(x.float(), y) for x, y in held(*most)]


def test_a_policy_of_half_precision_has_no_effect_on_a_measurement(sharded):
    both = sharded("fsdp_policy")
    assert both[0]["reports"][10] == both[1]["reports"][10]
    assert list(both[0]["reports"]) == [0, 10]
    last = both[0]["reports"][10]
    assert (last["engine"], last["precision"], last["gaps"]) == ("difference", "float32", {})
    module, batches = in_float32(both)
    report = measure_hessian(module, batches, loss=loss_of, num_steps=3, num_probes=2)
    assert last["loss"] == pytest.approx(report.loss, rel=1e-6)
    # What differences in float32 are worth; bfloat16 is off by 1e-2 and more.
    assert last["trace"] == pytest.approx(report.trace, rel=1e-3)
    assert last["lambda_max"] == pytest.approx(float(report.lambda_max), rel=1e-3)
    slices = sharded("fsdp_policy_slices")
    found = {n.partition("/")[2]: v for n, v in slices[0]["slices"].items() if n.startswith("10/")}
    three = centred(1.0, 3)
    # Slices hold fewer.
    module, batches = in_float32(both, 1)
    plane = loss_plane(
        module, batches, alphas=three, betas=three, loss=loss_of, vectors="entry", evaluation="loop"
    )
    torch.testing.assert_close(found["plane_random"], plane.loss, rtol=1e-6, atol=0)
    # Training is in bfloat16 before and after, to the bit.
    for case in (both, slices):
        for one, other in zip(case, sharded("fsdp_policy_without"), strict=True):
            assert differences(one["weights"], other["weights"]) == []
            assert torch.equal(one["random"], other["random"])


def test_a_measurement_that_fails_under_fsdp2_leaves_training_alone(sharded):
    both, bare = sharded("fsdp_fails"), sharded("fsdp_without")
    assert 0 in both[0]["reports"]
    assert 4 not in both[0]["reports"]
    for one, other in zip(both, bare, strict=True):
        # The gathered weights of a sharded part were moved when the loss failed.
        assert differences(one["weights"], other["weights"]) == []


def test_the_exact_engine_is_refused_for_sharded_parameters(sharded):
    for each in sharded("fsdp_exact"):
        assert "give engine='difference' or 'auto'" in each["refused"]


def test_tensor_parallelism_measures_exactly(sharded):
    both = sharded("tensor")
    last = both[0]["reports"][18]
    assert last["engine"] == "exact"
    bare = sharded("tensor_without")
    for one, other in zip(both, bare, strict=True):
        assert differences(one["weights"], other["weights"]) == []
    module = Sharded()
    module.load_state_dict(both[0]["weights"])
    report = measure_hessian(
        module,
        whole_batches(4),
        loss=loss_of,
        num_steps=SETTINGS["num_steps"],
        num_probes=SETTINGS["num_probes"],
    )
    assert_same(last, report, rtol=1e-9)


class AsOne(Sharded):
    """The same network in one process, for a loop by hand."""

    def loss(self, batch):
        return cross_entropy(self.net(batch[0]), batch[1])


@pytest.mark.parametrize("case", NOISE)
def test_each_process_moves_its_part_by_the_noise_of_one_process(sharded, case):
    """Shards of rows under FSDP2, of rows and of columns otherwise, flat pieces under FSDP1."""
    source = torch.Generator().manual_seed(7)
    x = torch.randn(36, 3, generator=source, dtype=torch.float64)
    y = (x.sum(1) > 0).long()
    rows = [list(range(i, i + 4)) for i in range(0, 36, 4)]
    if not case.startswith("tensor"):
        # Process r trains on samples r, r + 2, ... and the last batch is of two samples.
        each = [range(r, 36, 2) for r in (0, 1)]
        rows = [list(each[r][i : i + 4]) for i in range(0, 18, 4) for r in (0, 1)]
    batches = [(x[r], y[r]) for r in rows] * 2
    gradient = partial(noise, relative="relative" in case)
    together = 1 if case.startswith("tensor") else 2
    module = train_by_hand(AsOne(), batches, gradient, lambda step: 0.02, together)
    both = sharded(case)
    for each in both:
        for name, p in module.state_dict().items():
            assert float((each["weights"][name] - p).abs().max()) < 1e-12, name
    timeless = [{t: v for t, v in b["logged"].items() if "seconds" not in t} for b in both]
    assert timeless[0] == timeless[1]
    assert {"regularizer/penalty", "regularizer/loss"} <= set(timeless[0])


@pytest.mark.parametrize("kind", ["fsdp", "tensor"])
def test_slices_in_shards_are_those_of_one_process(sharded, kind):
    both = sharded(f"{kind}_slices")
    assert both[0]["all warnings"] == both[1]["all warnings"] == []
    first, second = (each["slices"] for each in both)
    assert differences(first, second) == []
    step = max(int(name.partition("/")[0]) for name in first)
    found = {n.partition("/")[2]: v for n, v in first.items() if n.startswith(f"{step}/")}
    assert bool(torch.isfinite(found["plane_trajectory"]).all())
    module = Sharded()
    module.load_state_dict(both[0]["weights"])
    batches = held(1) if kind == "fsdp" else whole_batches(2)
    assert float(found["loss"]) == pytest.approx(
        float(sum(loss_of(module, b).detach() for b in batches) / len(batches)), rel=1e-12
    )
    three, common = centred(1.0, 3), {"loss": loss_of, "vectors": "entry"}
    plane = loss_plane(module, batches, alphas=three, betas=three, evaluation="loop", **common)
    torch.testing.assert_close(found["plane_random"], plane.loss, rtol=1e-12, atol=0)
    for name in ("top1", "gradient"):
        reach = float(found[f"line_{name}/reach0"])
        line = loss_line(module, batches, directions=name, alphas=centred(reach, 3), loss=loss_of)
        torch.testing.assert_close(found[f"line_{name}"], line.loss, rtol=1e-4, atol=0)
    basin = basin_radii(module, batches, num_rays=1, **common)
    torch.testing.assert_close(found["basin"], basin.radii, rtol=1e-9, atol=0)
    if kind == "tensor":
        convex = convexity_map(module, batches, alphas=three, betas=three, **common)
        ends = torch.stack([convex.lambda_min, convex.lambda_max])
        torch.testing.assert_close(found["convexity"], ends, rtol=1e-3, atol=1e-5)
    for one, other in zip(both, sharded(f"{kind}_without"), strict=True):
        assert differences(one["weights"], other["weights"]) == []
        assert torch.equal(one["random"], other["random"])


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


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_noise_refuses_shards_that_it_cannot_move(strategy):
    callback, trainer, net = HessianTraceRegularizer(1e-3, estimator="noise"), Stub(strategy), Net()
    if strategy == "DeepSpeedStrategy":
        with pytest.raises(MisconfigurationException, match=rf"{strategy}.*\(FSDP2\), strategy="):
            callback.setup(trainer, net, "fit")
    else:
        callback.setup(trainer, net, "fit")
    if strategy == "FSDPStrategy":
        net.automatic_optimization = False
        with pytest.raises(MisconfigurationException, match="Use automatic optimization, or"):
            callback.setup(trainer, net, "fit")
        trainer.strategy.kwargs = {"use_orig_params": False}
        with pytest.raises(MisconfigurationException, match="Leave use_orig_params at True"):
            callback.setup(trainer, net, "fit")
    # The others move whole parameters, and name who does not.
    way = r" under ModelParallel.*\(FSDP2\)" if strategy == "DeepSpeedStrategy" else ""
    with pytest.raises(MisconfigurationException, match=rf"{strategy}.*'noise' with .*own{way}\.$"):
        HessianTraceRegularizer(1e-3).setup(trainer, Net(), "fit")


def test_monitors_that_move_whole_parameters_refuse_spread_ones():
    class Whole(HessianMonitor):
        measures_shards = False

    with pytest.raises(MisconfigurationException, match=r"moves whole parameters.*Train with DDP"):
        Whole().setup(Stub("ModelParallelStrategy"), Net(), "fit")

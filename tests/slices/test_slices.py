"""Lines and planes: exact where the loss is known, restored whatever happens."""

from __future__ import annotations

import copy
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.text import Text
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from lla_callbacks import interpolate, loss_line, loss_plane, measure_hessian
from lla_callbacks.objective.grid import centred, coarse_to_fine, complete_axes, spanning
from lla_callbacks.objective.objective import Objective
from lla_callbacks.objective.points import PointSettings, space_of
from lla_callbacks.slices.directions import Direction, random_directions
from lla_callbacks.slices.eigenvectors import curved_directions
from lla_callbacks.slices.slices import measure_line, measure_plane
from tests.cases import batch_norm_net, cross_entropy, tanh_net
from tests.slices.slice_cases import (
    Weights,
    linear,
    of,
    quadratic,
    relu_net,
    symmetric,
    two_batches,
)

LOOP = PointSettings(evaluation="loop")
ALPHAS = torch.linspace(-1, 1, 5, dtype=torch.float64)
BETAS = torch.linspace(-2, 2, 9, dtype=torch.float64)


def own(vector: Tensor) -> Direction:
    return Direction(vector, "own")


@pytest.mark.parametrize("evaluation", ["loop", "vmap"])
def test_a_linear_loss_is_a_plane_on_a_grid_that_is_not_square(evaluation: Any) -> None:
    module = Weights((2, 3), (5,))
    slopes, d, e = torch.randn(3, 11, dtype=torch.float64)
    plane = measure_plane(
        of(module, linear(slopes)), (own(d), own(e)), ALPHAS, BETAS,
        PointSettings(evaluation=evaluation),
    )  # fmt: skip
    start = float(slopes @ module.flat().detach())
    expected = start + ALPHAS[:, None] * (slopes @ d) + BETAS[None] * (slopes @ e)
    assert plane.loss.shape == (5, 9)
    torch.testing.assert_close(plane.loss, expected, rtol=1e-12, atol=1e-12)
    assert plane.loss.min() < 0
    assert plane.complete


def test_a_quadratic_loss_is_its_paraboloid() -> None:
    module = Weights((2, 3), (5,))
    matrix = symmetric(11)
    d, e = torch.randn(2, 11, dtype=torch.float64)
    plane = measure_plane(of(module, quadratic(matrix)), (own(d), own(e)), ALPHAS, BETAS, LOOP)
    for i, a in enumerate(ALPHAS):
        for j, b in enumerate(BETAS):
            point = module.flat().detach() + a * d + b * e
            expected = 0.5 * float(point @ matrix @ point)
            assert float(plane.loss[i, j]) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("mode", ["batch", "eval", "recalibrate"])
@pytest.mark.parametrize("evaluation", ["loop", "auto"])
def test_the_centre_is_the_plain_loss_to_the_bit(mode: Any, evaluation: Any) -> None:
    module = batch_norm_net()
    module(torch.randn(30, 4) * 2 + 1)
    batch = two_batches()[0]
    plane = loss_plane(
        module, [batch], loss=cross_entropy, mode=mode, evaluation=evaluation,
        alphas=ALPHAS, betas=BETAS,
    )  # fmt: skip
    if mode == "recalibrate":
        twin = copy.deepcopy(module)
        for m in twin.modules():
            if isinstance(m, nn.BatchNorm1d):
                m.momentum = 1.0
        twin.train()(batch[0])
        expected = cross_entropy(twin.eval(), batch)
    else:
        expected = cross_entropy(module.train(mode == "batch"), batch)
    assert float(plane.loss[2, 4]) == float(expected.detach())
    assert plane.centre_loss == float(expected.detach())


def test_several_batches_weigh_by_their_samples() -> None:
    module = tanh_net()
    line = loss_line(module, two_batches(), loss=cross_entropy, alphas=[0.0])
    parts = [float(cross_entropy(module, b).detach()) for b in two_batches()]
    assert float(line.loss[0]) == 7 / 11 * parts[0] + 4 / 11 * parts[1]


@pytest.mark.parametrize("mode", ["batch", "eval"])
def test_vmap_and_loop_agree(mode: Any) -> None:
    module = batch_norm_net()
    metric = {"accuracy": MulticlassAccuracy(3, average="micro")}
    found = [
        loss_plane(
            module, two_batches(), loss=cross_entropy, mode=mode, evaluation=evaluation,
            metrics=metric, alphas=ALPHAS, betas=BETAS,
        )
        for evaluation in ("loop", "vmap")
    ]  # fmt: skip
    assert [plane.facts.method for plane in found] == ["loop", "vmap"]
    torch.testing.assert_close(found[0].loss, found[1].loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[0].metrics["accuracy"], found[1].metrics["accuracy"])


def test_what_vmap_cannot_do_goes_through_the_loop() -> None:
    def loss(module: nn.Module, batch: Any) -> Tensor:
        value = cross_entropy(module, batch)
        return value * 2 if value.item() > 1 else value  # data-dependent control flow

    plane = loss_plane(tanh_net(), two_batches(), loss=loss)
    assert plane.facts.method == "loop"
    assert plane.complete


def test_filter_normalized_pictures_do_not_see_a_rescaling_of_relu_layers() -> None:
    module = relu_net().double()
    scaled = copy.deepcopy(module)
    with torch.no_grad():
        scaled[0].weight.mul_(5)
        scaled[2].weight.div_(5)
    batches = [(x.double(), y) for x, y in two_batches()]
    pictures = [loss_plane(m, batches, loss=cross_entropy).loss for m in (module, scaled)]
    torch.testing.assert_close(*pictures, rtol=1e-6, atol=1e-9)
    plain = [
        loss_plane(m, batches, loss=cross_entropy, normalization="none").loss
        for m in (module, scaled)
    ]
    assert (plain[0] - plain[1]).abs().max() > 1e-3


def test_batch_mode_does_not_see_the_scale_of_weights_before_batch_norm() -> None:
    # Without its eps batch norm is exactly invariant.
    module = batch_norm_net().double()
    module[1].eps = 1e-30
    scaled = copy.deepcopy(module)
    with torch.no_grad():
        scaled[0].weight.mul_(7)
        scaled[0].bias.mul_(7)
    batches = [(x.double(), y) for x, y in two_batches()]
    pictures = [loss_plane(m, batches, loss=cross_entropy).loss for m in (module, scaled)]
    torch.testing.assert_close(*pictures, rtol=1e-6, atol=1e-9)


def test_batch_eval_and_recalibrated_pictures_differ_off_the_centre() -> None:
    module = batch_norm_net()
    batch = torch.randn(200, 4), torch.randint(0, 3, (200,))
    for _ in range(50):
        module(batch[0])
    before = {k: v.clone() for k, v in module.state_dict().items()}
    found = {
        mode: loss_plane(module, [batch], loss=cross_entropy, mode=mode).loss
        for mode in ("batch", "eval", "recalibrate")
    }
    assert (found["batch"] - found["eval"]).abs().max() > 1e-2
    # The same statistics but for the unbiased variance.
    gap = (found["batch"] - found["recalibrate"]).abs().max()
    assert 0 < gap < 0.2 * (found["batch"] - found["eval"]).abs().max()
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_dropout_is_off_in_a_grid() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.drop = nn.Linear(4, 3), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.drop(self.a(x)), 0.5, training=True)

    module = Net()
    batch = two_batches()[0]
    line = loss_line(module, [batch], loss=cross_entropy, alphas=[0.0])
    expected = F.cross_entropy(module.a(batch[0]), batch[1])
    assert float(line.loss[0]) == float(expected.detach())


class Breaks(nn.Module):
    """Raises at the n-th call, having changed what a step can change."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.net = batch_norm_net()
        self.calls, self.left = 0, calls
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        # A counter that the guard does not see: one on the class, or a global, is put back.
        torch.testing.calls.append(1)  # type: ignore[attr-defined]
        self.calls += 1
        self.seen.append(1.0)
        self.net.eval()
        torch.rand(1)
        if len(torch.testing.calls) == self.left:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return self.net(x)


@pytest.mark.parametrize("calls", [1, 2, 3, 20, 10**6])
def test_everything_is_restored_also_after_an_exception(
    calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.testing, "calls", [], raising=False)
    module = Breaks(calls)
    module.train()
    module.net[2].eval()
    for p in module.parameters():
        p.grad = torch.ones_like(p)

    def state() -> list[Any]:
        return [
            *(v.clone() for v in module.state_dict().values()),
            *(p.grad.clone() for p in module.parameters()),
            *(torch.tensor(p._version) for p in module.parameters()),
            torch.tensor([m.training for m in module.modules()]),
            torch.tensor([module.calls, len(module.seen)]),
            torch.get_rng_state(),
        ]

    before = state()
    try:
        loss_plane(
            module, two_batches(), loss=cross_entropy, alphas=ALPHAS, betas=BETAS, evaluation="loop"
        )
        interrupted = False
    except KeyboardInterrupt:
        interrupted = True
    assert interrupted == (calls < 10**6)
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))


def test_a_loss_that_changes_its_batch_or_state_is_the_same_at_every_point() -> None:
    class Greedy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tanh_net()
            self.register_buffer("count", torch.zeros(()))
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            self.calls += 1
            x.mul_(2)
            return self.net(x) * self.count * self.calls

    module = Greedy()
    same = loss_line(
        module, two_batches(), loss=cross_entropy, directions=torch.zeros(43),
        alphas=[-1.0, 0.0, 1.0], evaluation="loop",
    )  # fmt: skip
    assert len(set(same.loss.tolist())) == 1


def test_a_loss_that_differentiates_itself_is_measured() -> None:
    def penalty(module: nn.Module, batch: Any) -> Tensor:
        x = batch[0].requires_grad_(True)
        (slope,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
        return slope.square().mean()

    module = tanh_net()
    line = loss_line(module, two_batches(), loss=penalty, alphas=[0.0, 0.5])
    assert torch.isfinite(line.loss).all()


def test_losses_that_are_not_finite_stay_what_they_are() -> None:
    module = Weights((2, 2))
    direction = own(torch.ones(4, dtype=torch.float64))

    def loss(module: Any, batch: Any) -> Tensor:
        mean = module.flat().mean()
        return torch.where(mean > 2.9, torch.inf, torch.where(mean < -2.9, torch.nan, mean))

    with torch.no_grad():
        module.parts[0].zero_()
    line = measure_line(of(module, loss), direction, torch.tensor([-3.0, 0, 3]).double(), LOOP)
    assert line.loss[0].isnan()
    assert line.loss[2].isposinf()
    assert line.evaluated.all()


# -- metrics ------------------------------------------------------------------------------


def test_metrics_on_the_same_points_at_no_further_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where no guard looks.
    calls: list[int] = []
    monkeypatch.setattr(torch.testing, "calls", calls, raising=False)

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tanh_net()

        def forward(self, x: Tensor) -> Tensor:
            torch.testing.calls.append(1)  # type: ignore[attr-defined]
            return self.net(x)

    module = Counted()
    plane = loss_plane(
        module, two_batches(), loss=cross_entropy, alphas=ALPHAS, betas=BETAS, evaluation="loop",
        check=False,
        metrics={"accuracy": MulticlassAccuracy(3, average="micro"),
                 "norm": lambda m, b: m.net[0].weight.norm()},
    )  # fmt: skip
    # Two batches at 45 points and at the check of the centre; the function calls no network.
    assert len(calls) == 2 * (45 + 1)
    x, y = (torch.cat(parts) for parts in zip(*two_batches(), strict=True))
    assert plane.metrics["accuracy"].shape == (5, 9)
    expected = (module.net(x).argmax(1) == y).double().mean()
    assert float(plane.metrics["accuracy"][2, 4]) == pytest.approx(float(expected))
    assert float(plane.metrics["norm"][2, 4]) == pytest.approx(
        float(module.net[0].weight.detach().norm())
    )
    assert plane.metrics["norm"].unique().numel() > 5


def test_metrics_of_batches_that_are_no_pairs() -> None:
    batches = [{"x": x, "y": y} for x, y in two_batches()]

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch["x"]), batch["y"])

    accuracy = {"accuracy": MulticlassAccuracy(3, average="micro")}
    with pytest.raises(ValueError, match=r"no pair.*give predict="):
        loss_plane(tanh_net(), batches, loss=loss, metrics=accuracy)
    plane = loss_plane(
        tanh_net(), batches, loss=loss, metrics=accuracy,
        predict=lambda module, batch: (module(batch["x"]), batch["y"]),
    )  # fmt: skip
    assert plane.metrics["accuracy"].isfinite().all()


def test_a_metric_with_several_values_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not one number.*average='macro'"):
        loss_line(
            tanh_net(), two_batches(), loss=cross_entropy, evaluation="loop",
            metrics={"each": MulticlassAccuracy(3, average=None)},
        )  # fmt: skip


# -- grids, order, budget, resume ---------------------------------------------------------


def test_default_coordinates_hold_the_centre_exactly() -> None:
    assert centred(0.3, 17)[8] == 0
    assert centred(0.3, 17)[-1] == -centred(0.3, 17)[0]
    for low, high in ((-3.1, 0.4), (-1.0, 0.0), (0.0, 2.0), (-0.7, 5.0)):
        axis = spanning(low, high, 17)
        assert (axis == 0).sum() == 1
        assert axis[0] <= low + 1e-9
        assert axis[-1] >= high - 1e-9
    for count in (4, 1, 2.5, True):
        with pytest.raises(ValueError, match="odd whole"):
            centred(1.0, count)  # type: ignore[arg-type]


@pytest.mark.parametrize(("shape", "centre"), [((17, 17), (8, 8)), ((5, 9), (2, 4)), ((4,), (3,))])
def test_coarse_to_fine_visits_every_point_once_and_coarse_pictures_first(
    shape: tuple[int, ...], centre: tuple[int, ...]
) -> None:
    levels = coarse_to_fine(shape, centre)
    flat = [i for level in levels for i in level]
    count = int(torch.tensor(shape).prod())
    assert sorted(flat) == list(range(count))
    done = torch.zeros(count, dtype=torch.bool)
    sizes = []
    for level in levels:
        done[level] = True
        axes = complete_axes(shape, done.reshape(shape), centre)
        sizes.append(int(torch.tensor([len(a) for a in axes]).prod()))
    # Every level leaves a complete picture of all that was computed.
    assert sizes == [sum(map(len, levels[: k + 1])) for k in range(len(levels))]


def test_a_time_budget_leaves_a_complete_coarse_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]  # of a clock that the loss moves
    clock = {"monotonic": lambda: now[0], "thread_time": time.thread_time}
    monkeypatch.setattr("lla_callbacks.objective.points.time", SimpleNamespace(**clock))
    calls = []

    def slow(module: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        now[0] += 0.05 * (len(calls) > 30)
        return cross_entropy(module, batch)

    plane = loss_plane(tanh_net(), two_batches()[:1], loss=slow, time_budget=0.5, evaluation="loop")
    assert not plane.complete
    assert 11 <= len(calls) - 30 <= 13
    assert plane.loss[~plane.evaluated].isnan().all()
    assert plane.loss[plane.evaluated].isfinite().all()
    axes = complete_axes((17, 17), plane.evaluated, (8, 8))
    assert len(axes[0]) >= 3
    assert bool(plane.evaluated[8, 8])


def test_a_time_budget_that_is_over_at_once_leaves_the_centre() -> None:
    settings = {"loss": cross_entropy, "time_budget": 1e-9}
    plane = loss_plane(tanh_net(), two_batches()[:1], **settings)
    line = loss_line(tanh_net(), two_batches()[:1], directions="top1", **settings)
    assert int(plane.evaluated.sum()) == int(line.evaluated.sum()) == 1
    assert "(1 of them evaluated before time_budget was over)" in plane.summary()
    assert "1 of 41 points (time_budget was over)" in line.summary()
    plane.figure()
    titles = [text.get_text() for text in line.figure().findobj(Text)]
    assert any("curvature undefined" in title for title in titles), titles


def test_checkpoints_may_be_paths(tmp_path: Any) -> None:
    module, other = tanh_net(), tanh_net()
    with torch.no_grad():
        other[0].weight.mul_(1.5)
    torch.save({"state_dict": other.state_dict()}, tmp_path / "other.ckpt")
    settings = {"loss": cross_entropy, "alphas": [-1, 0, 1], "check": False}
    for given in (tmp_path / "other.ckpt", str(tmp_path / "other.ckpt")):
        line, same = (
            loss_line(module, two_batches(), directions="update", checkpoints=[c], **settings)
            for c in (given, other)
        )
        torch.testing.assert_close(line.loss, same.loss)
        end = interpolate(module, two_batches(), loss=cross_entropy, end=given, mode="eval")
        expected = interpolate(module, two_batches(), loss=cross_entropy, end=other, mode="eval")
        torch.testing.assert_close(end.loss, expected.loss)
    with pytest.raises(ValueError, match=r"checkpoints is 'nope.ckpt', which is no file"):
        loss_line(module, two_batches(), directions="update", checkpoints=["nope.ckpt"], **settings)


def test_a_grid_that_was_cut_off_goes_on_and_ends_as_if_it_had_not(tmp_path: Any) -> None:
    module = Weights((2, 3), (5,))
    slopes = torch.randn(11, dtype=torch.float64)
    settings = {"evaluation": "loop", "directions": "random", "alphas": ALPHAS, "betas": BETAS}
    settings |= {"check": False}
    batch = torch.zeros(3, 1)
    whole = loss_plane(module, [batch], loss=linear(slopes), **settings)
    assert whole.loss.min() < 0  # a negative loss is no sign of an unfinished point
    calls = []

    def broken(module: Any, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 21:
            raise RuntimeError("out of luck")
        return slopes @ module.flat()

    file = tmp_path / "plane.npz"
    with pytest.raises(RuntimeError, match="out of luck"):
        loss_plane(module, [batch], loss=broken, file=file, **settings)
    calls.clear()

    def counted(module: Any, batch: Any) -> Tensor:
        calls.append(1)
        return slopes @ module.flat()

    resumed = loss_plane(module, [batch], loss=counted, file=file, **settings)
    assert torch.equal(resumed.loss, whole.loss)
    # One call each told what the grid is of, and what its centre is.
    assert resumed.facts.num_points == 45 - 19
    assert len(calls) == 2 + 26
    again = loss_plane(module, [batch], loss=counted, file=file, **settings)
    assert again.facts.num_points == 0
    assert torch.equal(again.loss, whole.loss)


def test_a_file_of_another_grid_is_refused(tmp_path: Any) -> None:
    file = tmp_path / "plane.npz"
    module = tanh_net()
    settings = {"loss": cross_entropy, "alphas": ALPHAS, "betas": BETAS, "file": file}
    loss_plane(module, two_batches(), **settings)
    with torch.no_grad():
        module[0].weight += 1
    with pytest.raises(ValueError, match=r"other weights.*delete this one"):
        loss_plane(module, two_batches(), **settings)
    plane = loss_plane(module, two_batches(), loss=cross_entropy, alphas=ALPHAS, betas=BETAS)
    other = plane.save(tmp_path / "saved.npz")
    with pytest.raises(ValueError, match="no grid to go on with"):
        loss_plane(module, two_batches(), **{**settings, "file": other})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"alphas": [1.0, 0.0]}, "ascending"),
        ({"alphas": [0.0, float("nan")]}, "finite"),
        ({"betas": "wide"}, "betas is 'wide'"),
        ({"mode": "train"}, "mode is 'train'"),
        ({"normalization": "filters"}, "normalization is 'filters'; give one of filter"),
        ({"vectors": "skip"}, "vectors is 'skip'"),
        ({"evaluation": "fast"}, "evaluation is 'fast'"),
        ({"time_budget": 0}, "time_budget is 0"),
        ({"metrics": [1]}, "metrics is of type list"),
        ({"metrics": {"loss": len}}, "other than 'loss'"),
        ({"metrics": {"a": 3}}, "of type int"),
        ({"seed": -1}, "seed is -1"),
        ({"loss": 3}, "loss is 3"),
        ({"directions": "up"}, "directions"),
    ],
)
def test_settings_that_are_not_allowed(setting: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss_plane(tanh_net(), two_batches(), **{"loss": cross_entropy, **setting})


# -- interpolation ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["batch", "eval"])
def test_interpolation_is_exact_at_both_ends(mode: Any) -> None:
    modules = [batch_norm_net(), batch_norm_net()]
    for k, m in enumerate(modules):
        torch.nn.init.normal_(m[0].weight, generator=torch.Generator().manual_seed(k))
        m(torch.randn(40, 4) * (k + 1))
    batch = two_batches()[0]
    host = batch_norm_net()
    line = interpolate(host, [batch], *modules, loss=cross_entropy, mode=mode)
    for m, alpha in zip(modules, (0.0, 1.0), strict=True):
        (i,) = torch.nonzero(line.alphas == alpha).flatten().tolist()
        expected = cross_entropy(copy.deepcopy(m).train(mode == "batch"), batch)
        assert float(line.loss[i]) == float(expected.detach())
    assert line.loss.isfinite().all()


def test_interpolation_needs_an_end_and_running_statistics() -> None:
    module = batch_norm_net()
    with pytest.raises(ValueError, match="both None"):
        interpolate(module, two_batches(), loss=cross_entropy)
    weights = dict(module.named_parameters())
    with pytest.raises(ValueError, match=r"mode 'eval' needs it"):
        interpolate(module, two_batches(), None, weights, loss=cross_entropy, mode="eval")


# -- curvature ----------------------------------------------------------------------------


def test_along_eigenvectors_the_second_difference_is_the_eigenvalue() -> None:
    module = tanh_net().double()
    objective = Objective(module, [(x.double(), y) for x, y in two_batches()], cross_entropy)
    found = curved_directions(objective, {"top1", "top2", "bottom1"}, seed=0)
    for direction in found.values():
        line = measure_line(objective, direction, centred(direction.reach, 41), LOOP)
        assert line.curvature == pytest.approx(direction.eigenvalue, rel=1e-3)
        error = abs(line.curvature - direction.eigenvalue)
        assert error <= line.curvature_error + direction.residual


def test_curvature_needs_five_even_points_about_the_centre() -> None:
    module = Weights((2, 2))
    objective = of(module, quadratic(torch.eye(4, dtype=torch.float64)))
    direction = own(torch.tensor([1.0, 0, 0, 0], dtype=torch.float64))
    for alphas in ([-1.0, 0, 1], [0.0, 1, 2], [-2.0, -1, 0, 1, 3], [1.0, 2, 3, 4, 5]):
        line = measure_line(objective, direction, torch.tensor(alphas).double(), LOOP)
        assert line.curvature != line.curvature
    line = measure_line(objective, direction, centred(1.0, 5), LOOP)
    assert line.curvature == pytest.approx(1.0, rel=1e-9)


def test_tied_weights_move_once_and_frozen_ones_not() -> None:
    from tests.cases import Tied

    module = Tied()
    module.head.weight.requires_grad_(False)
    objective = Objective(module, two_batches(), cross_entropy)
    directions = random_directions(module, space_of(objective))
    assert len(directions[0].vector) == sum(
        p.numel() for p in module.parameters() if p.requires_grad
    )
    plane = measure_plane(objective, directions, ALPHAS, BETAS, LOOP)
    batched = measure_plane(objective, directions, ALPHAS, BETAS, PointSettings(evaluation="vmap"))
    torch.testing.assert_close(plane.loss, batched.loss, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        offsets = space_of(objective).unflatten(directions[0].vector)
        for p, d in zip(space_of(objective).tensors, offsets, strict=True):
            p.add_(d)
    assert float(plane.loss[4, 4]) == pytest.approx(objective(), rel=1e-6)


def test_under_inference_mode_it_works_all_the_same() -> None:
    module = tanh_net()
    outside = loss_plane(module, two_batches(), loss=cross_entropy, directions="hessian")
    with torch.inference_mode():
        inside = loss_plane(module, two_batches(), loss=cross_entropy, directions="hessian")
    torch.testing.assert_close(inside.loss, outside.loss, rtol=1e-5, atol=1e-6)
    cross_entropy(module, two_batches()[0]).backward()


def test_submodules_in_a_plain_list_are_the_ones_that_move() -> None:
    class Ordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)
            self.order = [self.a, self.b]

        def forward(self, x: Tensor) -> Tensor:
            for module in self.order:
                x = torch.tanh(module(x))
            return x

    module = Ordered()
    line = loss_line(module, two_batches(), loss=cross_entropy, alphas=[-1.0, 0.0, 1.0])
    assert len(set(line.loss.tolist())) == 3
    report = measure_hessian(module, two_batches(), loss=cross_entropy, num_steps=4)
    assert abs(report.lambda_max) > 1e-3


def test_a_batch_that_a_step_replaces_in_place_is_whole_at_every_point() -> None:
    def halving(module: nn.Module, batch: Any) -> Tensor:
        batch["x"] = batch["x"] / 2
        return F.cross_entropy(module(batch["x"]), batch["y"])

    batch = {"x": two_batches()[0][0], "y": two_batches()[0][1]}
    same = loss_line(
        tanh_net(), [batch], loss=halving, directions=torch.zeros(43), alphas=[-1.0, 0.0, 1.0],
        evaluation="loop",
    )  # fmt: skip
    assert len(set(same.loss.tolist())) == 1


def test_long_lists_of_the_user_are_compared_and_still_restored() -> None:
    module = tanh_net()
    module.log = [(i, "seen") for i in range(1000)]

    def loss(m: nn.Module, batch: Any) -> Tensor:
        m.log.append(("now", len(m.log)))
        return cross_entropy(m, batch) * len(m.log)

    same = loss_line(
        module, two_batches(), loss=loss, directions=torch.zeros(43), alphas=[-1.0, 0.0, 1.0],
        evaluation="loop",
    )  # fmt: skip
    assert len(set(same.loss.tolist())) == 1
    assert len(module.log) == 1000


def test_a_path_is_drawn_on_its_own_axes_only() -> None:
    start = {n: p.detach() + 1 for n, p in tanh_net().named_parameters()}
    middle = {n: p.detach() + torch.randn_like(p) for n, p in tanh_net().named_parameters()}
    settings = {"loss": cross_entropy, "checkpoints": [start, middle]}
    module = tanh_net()
    assert loss_plane(module, two_batches(), directions="trajectory", **settings).path is not None
    for names in (("pc1", "gradient"), ("pc2", "pc1")):
        assert loss_plane(module, two_batches(), directions=names, **settings).path is None


def test_metrics_do_not_wait_for_other_processes() -> None:
    metric = MulticlassAccuracy(3, average="micro")
    metric.distributed_available_fn = lambda: True
    waited = []
    metric.dist_sync_fn = lambda *a, **k: waited.append(1)
    loss_line(tanh_net(), two_batches(), loss=cross_entropy, metrics={"a": metric}, alphas=[0.0])
    assert waited == []
    assert metric.sync_on_compute


def test_a_resumed_grid_sees_another_loss(tmp_path: Any) -> None:
    file = tmp_path / "plane.npz"
    module = tanh_net()
    settings = {"alphas": ALPHAS, "betas": BETAS, "file": file}
    loss_plane(module, two_batches(), loss=cross_entropy, **settings)
    with pytest.raises(ValueError, match="other weights"):
        loss_plane(module, two_batches(), loss=lambda m, b: 2 * cross_entropy(m, b), **settings)


def test_where_nothing_moves_it_says_so() -> None:
    module = Weights((5,))
    with pytest.raises(ValueError, match=r"nothing moves.*vectors='tensor'"):
        loss_line(module, [torch.zeros(3, 1)], loss=linear(torch.ones(5, dtype=torch.float64)))

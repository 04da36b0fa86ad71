"""Directions: exact norms, exact orthogonality, the same draw for the same seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lla_callbacks.objective.objective import Objective
from lla_callbacks.objective.points import space_of
from lla_callbacks.slices.choice import DirectionSource, line_names, plane_names
from lla_callbacks.slices.directions import (
    adam_directions,
    cosine,
    difference,
    direction_of,
    flat_weights,
    gradient_direction,
    random_directions,
)
from lla_callbacks.slices.eigenvectors import curved_directions
from lla_callbacks.slices.filters import Filters
from lla_callbacks.slices.landscape import LandscapeSettings, measure_landscape
from tests.cases import Tied, cross_entropy, tanh_net
from tests.slices.slice_cases import Weights, of, quadratic, space, symmetric, two_batches

NETS = {
    "conv": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(4, 3)
    ),
    "transposed": lambda: nn.Sequential(
        nn.ConvTranspose2d(4, 6, 3), nn.ConvTranspose1d(4, 6, 2, groups=2)
    ),
    "embedding": lambda: nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 2)),
    "one entry a filter": lambda: nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)),
    "tied": Tied,
}


@pytest.mark.parametrize("vectors", ["zero", "tensor", "entry"])
@pytest.mark.parametrize("normalization", ["filter", "layer", "weight", "none"])
@pytest.mark.parametrize("net", NETS)
def test_two_directions_are_orthogonal(net: str, normalization: Any, vectors: Any) -> None:
    module = NETS[net]()
    pair = random_directions(module, space(module), normalization=normalization, vectors=vectors)
    assert abs(cosine(*pair)) < 1e-6


@pytest.mark.parametrize("net", NETS)
def test_each_filter_has_the_norm_of_the_weights_filter(net: str) -> None:
    module = NETS[net]()
    layout = space(module)
    for direction in random_directions(module, layout):
        for name, weights in zip(layout.names, layout.tensors, strict=True):
            part = direction.vector[layout.slices[name]].reshape(weights.shape)
            if weights.ndim == 1:
                assert not part.any()
                continue
            if net == "transposed":
                continue  # the next test
            expected = weights.detach().flatten(1).norm(dim=1)
            torch.testing.assert_close(part.flatten(1).norm(dim=1), expected, rtol=1e-6, atol=0)


def test_a_transposed_convolution_counts_its_output_channels() -> None:
    module = nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False)
    layout = space(module)
    (direction,) = random_directions(module, layout, 1)
    part, weights = direction.vector.reshape(4, 3, 3, 3), module.weight.detach()
    for group in range(2):
        for channel in range(3):
            one = (slice(2 * group, 2 * group + 2), channel)
            torch.testing.assert_close(part[one].norm(), weights[one].norm(), rtol=1e-6, atol=0)
    per_input = part.flatten(1).norm(dim=1) / weights.flatten(1).norm(dim=1)
    assert (per_input - 1).abs().max() > 1e-3


@pytest.mark.parametrize("vectors", ["tensor", "entry"])
def test_vectors_move_as_asked(vectors: Any) -> None:
    module = nn.Linear(3, 5)
    layout = space(module)
    (direction,) = random_directions(module, layout, 1, vectors=vectors)
    part, bias = direction.vector[layout.slices["bias"]], module.bias.detach()
    if vectors == "tensor":
        torch.testing.assert_close(part.norm(), bias.norm(), rtol=1e-6, atol=0)
    else:
        torch.testing.assert_close(part.abs(), bias.abs(), rtol=1e-6, atol=0)


def test_directions_are_gaussian_not_uniform() -> None:
    module = nn.Linear(200, 200, bias=False)
    (direction,) = random_directions(module, space(module), 1, normalization="none")
    v = direction.vector.double()
    count = len(v)
    # Five standard errors of the mean, the variance and the fourth moment of N(0, 1).
    assert abs(v.mean()) < 5 / count**0.5
    assert abs(v.var() - 1) < 5 * (2 / count) ** 0.5
    assert abs((v**4).mean() - 3) < 5 * (96 / count) ** 0.5


def test_one_seed_gives_the_same_directions_in_every_firing() -> None:
    module = nn.Linear(6, 4)
    first = random_directions(module, space(module), seed=5)
    torch.rand(7)
    again = random_directions(module, space(module), seed=5)
    assert all(torch.equal(a.vector, b.vector) for a, b in zip(first, again, strict=True))
    other = random_directions(module, space(module), seed=6)
    assert abs(cosine(first[0], other[0])) < 0.9
    # After training only the norms differ.
    with torch.no_grad():
        module.weight.mul_(3)
    later = random_directions(module, space(module), seed=5)
    assert cosine(first[0], later[0]) == pytest.approx(1, abs=1e-6)


def test_a_filter_of_zeros_stays_where_it_is() -> None:
    module = nn.Linear(3, 4, bias=False)
    with torch.no_grad():
        module.weight[2] = 0
    for direction in random_directions(module, space(module)):
        assert torch.isfinite(direction.vector).all()
        assert not direction.vector.reshape(4, 3)[2].any()


def test_moved_parameters_are_counted() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    assert Filters(module, space(module), "filter", "zero").num_moved() == 12
    assert Filters(module, space(module), "filter", "tensor").num_moved() == 24


def test_eigenvectors_are_those_of_a_known_hessian() -> None:
    module = Weights((2, 3), (4,))
    matrix = symmetric(10)
    values, vectors = torch.linalg.eigh(matrix)
    found = curved_directions(
        of(module, quadratic(matrix)), {"top1", "top2", "bottom1", "gradient"}, seed=0
    )
    gradient = matrix @ module.flat().detach()
    for name, index in (("top1", 9), ("top2", 8), ("bottom1", 0)):
        direction = found[name]
        assert abs(direction.eigenvalue - float(values[index])) <= direction.residual
        assert abs(float(direction.vector @ vectors[:, index])) == pytest.approx(1, abs=1e-4)
        assert float(direction.vector @ gradient) >= 0
        assert direction.slope == pytest.approx(float(direction.vector @ gradient), abs=1e-9)
        value = 0.5 * float(module.flat().detach() @ gradient)
        rise = 0.5 * abs(direction.eigenvalue) * direction.reach**2
        assert rise == pytest.approx(abs(value)) or direction.reach == pytest.approx(
            float(module.flat().detach().norm())
        )
    torch.testing.assert_close(found["gradient"].vector, gradient / gradient.norm())


def crowded() -> Tensor:
    """A Hessian as late in training: outliers, a bulk near zero, a little below it."""
    parts = [torch.linspace(0, 0.3, 52), torch.tensor([-0.02, -0.011, 2.9, 3.0, 10.0])]
    values = torch.cat(parts).double()
    basis = torch.linalg.qr(symmetric(len(values)))[0]
    return (basis * values) @ basis.T


def test_the_second_and_the_lowest_are_those_eigenvectors() -> None:
    matrix = crowded()
    values = torch.linalg.eigvalsh(matrix)
    module = Weights((3, 19))
    for seed in range(20):
        found = curved_directions(
            of(module, quadratic(matrix)), {"top1", "top2", "bottom1"}, seed=seed
        )
        for name, truth in (("top1", values[-1]), ("top2", values[-2]), ("bottom1", values[0])):
            direction = found[name]
            assert direction.settled
            # On its own scale, however small that is beside the largest.
            assert abs(direction.eigenvalue / float(truth) - 1) < 0.01
            assert direction.residual <= 0.01 * abs(float(truth)) * 1.01


def test_what_has_not_settled_is_not_called_by_that_name() -> None:
    matrix = crowded()
    found = curved_directions(
        of(Weights((3, 19)), quadratic(matrix)), {"top1", "bottom1"}, seed=0, num_steps=12
    )
    assert found["top1"].settled
    assert found["top1"].name.startswith("top eigenvector")
    assert not found["bottom1"].settled
    assert found["bottom1"].name.startswith("unsettled Ritz vector for the bottom eigenvector")


def test_one_lanczos_run_serves_all_eigenvectors() -> None:
    module = tanh_net()
    objective = Objective(module, two_batches(), cross_entropy)
    products: list[int] = []
    source = DirectionSource(objective, listener=products.append)
    source.prepare(["top1", "top2", "bottom1", "gradient", "random"])
    spent = sum(products)
    assert 0 < spent <= source.num_steps
    source.get(("top1", "bottom1"))
    source.get(("top2", "gradient"))
    assert sum(products) == spent


def test_what_cannot_be_differentiated_costs_its_own_slices_only() -> None:
    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.round()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    calls = []

    def loss(module: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return Rounded.apply(module(batch[0])).square().mean()

    objective = Objective(tanh_net(), two_batches()[:1], loss, engine="exact", check=False)
    settings = LandscapeSettings(
        lines=["random", "top1", "bottom1", "gradient"], plane_points=3, line_points=5
    )
    found = measure_landscape(objective, settings, DirectionSource(objective))
    assert set(found.planes) == {"random"}
    assert set(found.lines) == {"random"}
    assert set(found.missing) == {"line_top1", "line_bottom1", "line_gradient"}
    # The Hessian was tried once: beside the centre, once for all, and the points one call, and one
    # that saw what it takes in memory.
    assert len(calls) == 1 + 9 + 5 + 2


def test_why_a_plane_is_not_refined_is_told_as_it_is_written() -> None:
    class Never:
        reason = "metrics are of the whole; give metrics=None"

        def __init__(self, _: Any, settings: Any, *__: Any) -> None:
            self.settings = settings

        def finish(self, plane: Any) -> Any:
            return plane

    objective = Objective(tanh_net(), two_batches()[:1], cross_entropy, check=False)
    settings = LandscapeSettings(lines=[], plane_points=3, refine=True)
    found = measure_landscape(objective, settings, DirectionSource(objective), refining=Never)
    assert "Give metrics=None, or refine=False." in str(found.missing["refine"])


def test_adams_moments() -> None:
    module = tanh_net()
    layout = space(module)
    optimizer = torch.optim.Adam(module.parameters())
    with pytest.raises(ValueError, match="keeps no exp_avg"):
        adam_directions(optimizer, layout)
    cross_entropy(module, two_batches()[0]).backward()
    optimizer.step()
    first, second = adam_directions(optimizer, layout)
    gradient = layout.flatten([p.grad for p in layout.tensors])
    torch.testing.assert_close(first.vector, 0.1 * gradient)
    torch.testing.assert_close(second.vector, 0.001 * gradient**2)


def test_difference_and_update_and_gradient() -> None:
    module, other = tanh_net(), tanh_net()
    torch.nn.init.normal_(other[0].weight)
    layout = space(module)
    direction = difference(module, other.state_dict(), layout)
    torch.testing.assert_close(
        direction.vector, flat_weights(other, layout) - flat_weights(module, layout)
    )
    with pytest.raises(ValueError, match="gradient is zero"):
        gradient_direction(torch.zeros(3), 1.0, 1.0)


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (torch.zeros(3), "3 entries and the module 43"),
        ({"no such": torch.zeros(2)}, "no trainable parameter|missing"),
        ({"0.weight": torch.zeros(2)}, r"\(5, 4\) in the module"),
        (torch.full((43,), float("nan")), "not finite"),
        (3.0, "type float is not known"),
    ],
)
def test_own_directions_that_do_not_fit(thing: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        direction_of(thing, space(tanh_net()))


def test_own_directions_in_every_form() -> None:
    module = tanh_net()
    layout = space(module)
    vector = torch.randn(layout.dim)
    parts = dict(zip(layout.names, layout.unflatten(vector), strict=True))
    for thing in (vector, parts, list(parts.values())):
        assert torch.equal(direction_of(thing, layout).vector, vector)
    only = direction_of({"2.bias": torch.ones(3)}, layout).vector
    assert only.sum() == 3
    assert only[layout.slices["2.bias"]].sum() == 3


@pytest.mark.parametrize("value", ["nothing", "top1", ("top1",), 3, ("top1", "nothing")])
def test_names_of_planes_are_checked(value: Any) -> None:
    with pytest.raises(ValueError, match="directions"):
        plane_names(value)


@pytest.mark.parametrize("value", ["hessian", ("top1", "top2"), "top1+top2"])
def test_names_of_lines_are_checked(value: Any) -> None:
    with pytest.raises(ValueError, match="directions"):
        line_names(value)


def test_names_of_planes() -> None:
    assert plane_names("hessian") == ("top1", "top2")
    assert plane_names("gradient + top1") == ("gradient", "top1")
    assert plane_names(("random", "random")) == ("random", "random2")
    vector = torch.zeros(2)
    assert plane_names((vector, "top1"))[0] is vector


def test_directions_stay_orthogonal_where_they_are_turned() -> None:
    # One-entry filters of very unequal size: the others must turn by a visible angle.
    module = nn.Sequential(nn.Linear(1, 3, bias=False), nn.Linear(3, 4, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[2.0], [0.1], [0.1]]))
        module[1].weight.normal_(std=1.0)
    layout = space(module)
    first, second = random_directions(module, layout)
    assert abs(cosine(first, second)) < 1e-6
    rows = _rows(second.vector, layout.slices["1.weight"], 4)
    torch.testing.assert_close(rows.norm(dim=1), module[1].weight.detach().norm(dim=1))
    inner = (_rows(first.vector, layout.slices["1.weight"], 4) * rows).sum()
    assert abs(inner) > 1


def _rows(vector: Tensor, where: slice, count: int) -> Tensor:
    return vector[where].reshape(count, -1)


def test_sources_say_what_is_missing() -> None:
    objective = Objective(tanh_net(), two_batches(), cross_entropy)
    source = DirectionSource(objective)
    for name, message in (("adam_m", "optimizer="), ("update", "last step"), ("pc1", "path")):
        with pytest.raises(ValueError, match=message):
            source.get((name,))
    source = DirectionSource(
        objective, previous=flat_weights(objective.module, space_of(objective))
    )
    with pytest.raises(ValueError, match="last update was zero"):
        source.get(("update",))

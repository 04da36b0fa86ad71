"""The path of training: its plane, its residuals, its memory."""

from __future__ import annotations

import pytest
import torch

from lla_callbacks import loss_plane
from lla_callbacks.slices.directions import cosine
from lla_callbacks.slices.trajectory import MOST_WEIGHTS, Trajectory, principal_components
from tests.cases import cross_entropy, tanh_net
from tests.slices.slice_cases import BATCH, Weights, quadratic, space, symmetric, two_batches


def test_a_planar_path_lies_in_its_plane_and_its_loss_is_the_planes() -> None:
    module = Weights((4, 5))
    matrix = symmetric(20)
    a, b = torch.randn(2, 20, dtype=torch.float64)
    end = module.flat().detach()
    coordinates = torch.tensor([[3.0, 1.0], [2.0, 2.0], [1.0, -1.0], [0.5, 0.2]])
    weights = [end + x * a + y * b for x, y in coordinates.tolist()]
    plane = loss_plane(
        module, [BATCH], loss=quadratic(matrix), directions="trajectory",
        checkpoints=[{"parts.0": w.reshape(4, 5)} for w in weights],
    )  # fmt: skip
    path = plane.path
    assert path is not None
    assert float(path.explained.sum()) == pytest.approx(1, abs=1e-12)
    assert path.residuals.max() == 0
    assert abs(plane.cosine) < 1e-12
    first, second = (d.vector for d in plane.directions)
    for (x, y), w, loss in zip(path.points.tolist(), [*weights, end], path.loss, strict=True):
        torch.testing.assert_close(end + x * first + y * second, w, rtol=1e-9, atol=1e-9)
        assert float(loss) == pytest.approx(0.5 * float(w @ matrix @ w), rel=1e-9)
    # The whole path is on the picture, and so is the end.
    assert plane.alphas[0] <= path.points[:, 0].min()
    assert plane.alphas[-1] >= path.points[:, 0].max()
    assert path.points[-1].abs().max() < 1e-12
    assert (plane.alphas == 0).sum() == 1
    assert (plane.betas == 0).sum() == 1


def test_explained_variance_and_residuals_against_a_singular_value_decomposition() -> None:
    module = Weights((30,))
    weights = [torch.randn(30, dtype=torch.float64) for _ in range(6)]
    end = torch.randn(30, dtype=torch.float64)
    (first, second), path = principal_components(weights, end, space(module), range(7))
    rows = torch.stack([*weights, end])
    centred = rows - rows.mean(0)
    _, singular, axes = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(path.explained, (singular**2 / (singular**2).sum())[:2])
    for k, direction in enumerate((first, second)):
        assert abs(float(direction.vector @ axes[k])) == pytest.approx(1, abs=1e-9)
    assert abs(cosine(first, second)) < 1e-12
    offsets = rows - end
    inside = offsets @ torch.stack([first.vector, second.vector]).T
    torch.testing.assert_close(path.points, inside)
    missed = (offsets - inside @ torch.stack([first.vector, second.vector])).norm(dim=1)
    expected = missed / offsets.norm(dim=1).clamp(min=1e-300)
    torch.testing.assert_close(path.residuals[:-1], expected[:-1])
    assert path.residuals[-1] == 0


@pytest.mark.parametrize("count", [0, 1])
def test_too_short_a_path_says_so(count: int) -> None:
    weights = [{n: p + 1 for n, p in tanh_net().named_parameters()}] * count
    with pytest.raises(ValueError, match="path"):
        loss_plane(
            tanh_net(), two_batches(), loss=cross_entropy, directions="trajectory",
            checkpoints=weights,
        )  # fmt: skip


def test_a_path_on_a_line_says_so() -> None:
    end = torch.zeros(4, dtype=torch.float64)
    weights = [torch.ones(4, dtype=torch.float64) * k for k in (3, 2, 1)]
    with pytest.raises(ValueError, match="lie on a line"):
        principal_components(weights, end, space(Weights((4,))), range(4))


def test_a_long_run_is_thinned_out_evenly() -> None:
    trajectory = Trajectory(memory=2**30)
    for step in range(1001):
        if trajectory.wants(step):
            trajectory.record(step, torch.full((3,), float(step)))
        assert len(trajectory.steps) < MOST_WEIGHTS
    assert len(trajectory.steps) >= MOST_WEIGHTS // 2 - 1
    gaps = {b - a for a, b in zip(trajectory.steps, trajectory.steps[1:], strict=False)}
    assert gaps == {trajectory.interval}
    assert trajectory.steps[0] == 0
    assert [float(w[0]) for w in trajectory.weights] == trajectory.steps


def test_a_path_keeps_to_its_memory() -> None:
    trajectory = Trajectory(memory=10 * 4 * 1000)
    for step in range(500):
        if trajectory.wants(step):
            trajectory.record(step, torch.zeros(1000))
    assert 4 <= len(trajectory.steps) <= 10

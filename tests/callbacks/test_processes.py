"""Two real processes share the points of slices, fail together, and train as if unwatched."""

import zlib

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lla_callbacks import (
    LossLandscapeMonitor,
    basin_radii,
    convexity_map,
    loss_line,
    loss_plane,
)
from lla_callbacks.linalg.errors import MeasurementError
from lla_callbacks.linalg.sharing import fail_together
from lla_callbacks.objective.grid import centred, gathered

from .ddp_slices import EVERYTHING, Net
from .modules import differences
from .two_processes import in_two

CASES = ["slices", "without", "failing", "budget", "beside", "refined"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes found, case by case."""
    return in_two(tmp_path_factory.mktemp("slices"), "tests.callbacks.ddp_slices", CASES)


@pytest.fixture
def together(found):
    return found("slices")


def test_both_processes_end_well(found):
    assert found.codes == [0, 0], found.output


def test_both_processes_find_the_same(together):
    first, second = together
    assert first["steps"] == second["steps"] == [0, 8]
    assert first["warnings"] == second["warnings"] == []
    names = [key for key in first if "/" in key]
    assert {"8/plane_random", "8/plane_trajectory", "8/line_update", "8/basin"} <= set(names)
    assert differences({k: first[k] for k in names}, {k: second[k] for k in names}) == []


def of_one_process(found):
    """The network in the end, and the same samples in the same batches.

    Process 0's held ones, then process 1's.
    """
    source = torch.Generator().manual_seed(7)
    x = torch.randn(32, 3, generator=source)
    y = (x.sum(1) > 0).long()
    held = [(x[a], y[a]) for a in ([0, 2, 4, 6], [8, 10, 12, 14], [1, 3, 5, 7], [9, 11, 13, 15])]
    module = Net()
    module.load_state_dict(found["weights"])
    return module, held


def loss(module, batch):
    return cross_entropy(module.net(batch[0]), batch[1])


def test_both_processes_refine_a_plane_from_the_outputs_of_both(found):
    first, second = found("refined")
    assert first["warnings"] == second["warnings"] == []
    seven = centred(1.0, 7)
    settings = {"alphas": seven, "betas": seven, "evaluation": "loop", "refine": True}
    plane = loss_plane(*of_one_process(first), loss=loss, **settings)
    for each in (first, second):
        torch.testing.assert_close(each["8/plane_random"], plane.loss, rtol=1e-6, atol=1e-7)
        fine = each["8/plane_random/fine"]
        torch.testing.assert_close(fine, plane.fine.loss, rtol=1e-5, atol=1e-6)


def test_slices_are_those_of_one_process_over_all_batches(together):
    first, _ = together
    module, held = of_one_process(first)
    five = centred(1.0, 5)
    plane = loss_plane(module, held, loss=loss, alphas=five, betas=five, evaluation="loop")
    torch.testing.assert_close(first["8/plane_random"], plane.loss, rtol=1e-6, atol=1e-7)
    assert first["8/loss"] == pytest.approx(plane.centre_loss, rel=1e-6)
    line = loss_line(module, held, loss=loss, alphas=five, evaluation="loop")
    torch.testing.assert_close(first["8/line_random"], line.loss, rtol=1e-6, atol=1e-7)
    basin = basin_radii(module, held, loss=loss, num_rays=5)
    torch.testing.assert_close(first["8/basin"], basin.radii, rtol=1e-5, atol=0)
    three = centred(1.0, 3)
    convex = convexity_map(module, held, loss=loss, alphas=three, betas=three)
    torch.testing.assert_close(first["8/convexity"], convex.ratio, rtol=1e-3, atol=1e-6)


def test_both_processes_take_eigenvectors_from_the_monitor_behind(together, found):
    first, second = found("beside")
    assert first["warnings"] == second["warnings"] == []
    assert (first["runs"], second["runs"]) == (0, 0)
    # At the start twice, since there is no update yet: whatever was found is dropped then.
    assert together[0]["runs"] == together[1]["runs"] == 3
    names = [key for key in first if "/" in key]
    assert differences({k: first[k] for k in names}, {k: second[k] for k in names}) == []
    # What rests on no eigenvector is the same to the bit; eigenvalues within 1 % of themselves.
    for name in ("8/loss", "8/plane_random", "8/line_random", "8/line_update"):
        assert differences({name: first[name]}, {name: together[0][name]}) == []
    ones, twos = (each["8/eigenvalue_bottom1"] for each in (first, together[0]))
    torch.testing.assert_close(ones, twos, rtol=0.02, atol=0)


def test_training_in_two_processes_is_left_bitwise_unchanged(together, found):
    for one, other in zip(together, found("without"), strict=True):
        assert differences(one["weights"], other["weights"]) == []
        assert torch.equal(one["random"], other["random"])


def test_a_process_that_fails_takes_the_others_into_the_same_gap(found):
    first, second = found("failing")
    assert first["steps"] == second["steps"] == [0, 8]
    # A slice is missing in both, and the first process, which speaks for both, names the cause.
    slices = {k.removeprefix("8/") for k in first if k.startswith("8/")}
    missing = [{s for s in slices if f"0/{s}" not in each} for each in (first, second)]
    assert missing[0] == missing[1]
    # What needed the evaluation that failed; a path and an update are not there yet anyway.
    assert "line_bottom1" in missing[0]
    assert any("the second process is unwell" in text for text in first["warnings"])


def test_a_budget_is_kept_by_all_processes_alike(found):
    first, second = found("budget")
    assert first["steps"] == second["steps"]


def test_synchronised_batch_norm_uses_its_own_process_statistics(monkeypatch):
    # Its own forward pass would exchange statistics with processes at other weights.
    plain, synced = Net().net, Net(sync=True).net
    synced.load_state_dict(plain.state_dict())
    batch = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])

    def loss(module, batch):
        return cross_entropy(module(batch[0]), batch[1])

    seen = []
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", lambda self, x: seen.append(1) or x)
    expected = loss_line(plain, [batch], loss=loss, alphas=[-1.0, 0.0, 1.0])
    found = loss_line(synced, [batch], loss=loss, alphas=[-1.0, 0.0, 1.0])
    assert torch.equal(found.loss, expected.loss)
    assert seen == []
    assert "forward" not in vars(synced[1])


# -- the exchange itself, in one process --------------------------------------------------


class Two:
    """Two processes, played in turns: what the other one contributes is given."""

    size = 2
    depth = 0

    def __init__(self, rank, others):
        self.rank = rank
        self.others = list(others)

    def total(self, values):
        return values + self.others.pop(0)

    exchange = total


def here(failed):
    """Return what the second process says when they meet: whether it failed, and where it is."""
    place = float(zlib.crc32(b"a check"))
    kind = float(zlib.crc32((b"NoneType", b"ValueError")[failed]))
    found = [[0.0, float(failed)], [0.0, place], [0.0, 0.0], [0.0, kind]]
    return torch.tensor(found, dtype=torch.float64).reshape(-1)


def test_values_that_are_not_finite_survive_the_exchange():
    nan, inf = float("nan"), float("inf")
    table = torch.tensor([[1.0], [nan], [nan], [inf], [nan]], dtype=torch.float64)
    done = torch.tensor([True, False, True, True, False])
    before = torch.tensor([True, False, False, False, False])
    other = torch.tensor([[0.0], [-5.0], [0.0], [0.0], [0.0]], dtype=torch.float64)
    codes = torch.tensor([[0.0], [0.0], [0.0], [0.0], [3.0]], dtype=torch.float64)
    new = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    found, evaluated = gathered(Two(0, [other, codes, new]), table, done, before)
    assert evaluated.all()
    expected = torch.tensor([[1.0], [-5.0], [nan], [inf], [-inf]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_the_others_are_told_who_failed_and_why():
    text = b"ValueError: too bad"
    words = torch.zeros(401, dtype=torch.float64)
    words[1 : 1 + len(text)] = torch.tensor(list(text), dtype=torch.float64)
    with pytest.raises(MeasurementError, match=r"process 1 failed.*ValueError: too bad"):
        fail_together(Two(0, [here(True), words]), None)
    # The one that failed raises the same, so that both take the same way on.
    with pytest.raises(MeasurementError, match="too bad") as caught:
        fail_together(
            Two(1, [torch.zeros(8, dtype=torch.float64), 0 * words]), ValueError("too bad")
        )
    assert isinstance(caught.value.__cause__, ValueError)
    fail_together(Two(0, [here(False)]), None)


def test_settings_of_the_processes_fit_the_monitor():
    LossLandscapeMonitor(**EVERYTHING)

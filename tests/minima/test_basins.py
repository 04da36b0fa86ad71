"""Two basins beside each other."""

import math
from dataclasses import replace

import pytest
import scipy.stats
import torch

from lla_callbacks import BasinRadii, basin_radii, compare_basins
from lla_callbacks.slices.scalars import _scalars
from lla_callbacks.slices.slices import SliceFacts
from tests.cases import cross_entropy, tanh_net
from tests.slices.slice_cases import two_batches

FACTS = SliceFacts(
    mode="eval", normalization="filter", seed=3, num_samples=512, num_params=120,
    method="loop", precision="float32", num_points=45, seconds=1.0,
)  # fmt: skip


def basin(radii, still_open=(), **changes):
    facts = replace(FACTS, **{k: changes.pop(k) for k in list(changes) if hasattr(FACTS, k)})
    is_open = torch.zeros(len(radii), dtype=torch.bool)
    is_open[list(still_open)] = True
    settings = {"cutoff": 1.0, "centre_loss": 0.2, "max_radius": 4.0, "dim": 100, "rtol": 0.01}
    radii = torch.tensor(radii, dtype=torch.float64)
    return BasinRadii(radii, is_open, **(settings | changes), facts=facts)


WIDE, NARROW = [0.8, 1.0, 1.3, 0.9, 1.1], [0.2, 0.25, 0.15, 0.2]


def test_the_ratio_has_welchs_interval_and_the_volume_is_n_times_its_logarithm():
    found = compare_basins(basin(WIDE), basin(NARROW), names=("good", "bad"))
    logs = [torch.tensor(v).double().log() for v in (WIDE, NARROW)]
    expected = scipy.stats.ttest_ind(*logs, equal_var=False).confidence_interval(0.95)
    assert found.ratio == pytest.approx(math.exp(float(logs[0].mean() - logs[1].mean())))
    assert found.interval == pytest.approx((math.exp(expected.low), math.exp(expected.high)))
    assert found.log10_volume_difference == pytest.approx(100 * math.log10(found.ratio))
    assert found.log10_volume_interval[0] == pytest.approx(100 * math.log10(found.interval[0]))
    assert (found.bound, found.rim) == ("equal", "cutoff")
    assert "100 x log10(" in found.summary()
    assert "good over bad" in repr(found)
    # The other way round it is the inverse.
    back = compare_basins(basin(NARROW), basin(WIDE))
    assert back.ratio == pytest.approx(1 / found.ratio)
    assert back.interval == pytest.approx((1 / found.interval[1], 1 / found.interval[0]))


def test_equal_rises_compare_and_say_so():
    low = basin(NARROW, cutoff=0.3, centre_loss=0.2)
    found = compare_basins(basin(WIDE, cutoff=1.1, centre_loss=1.0), low)
    assert found.rim == "rise"
    assert "0.1 above each loss" in found.summary()


@pytest.mark.parametrize(
    ("open_a", "open_b", "bound", "words"),
    [
        ([0], [], "at least", "at least 5"),
        ([], [1], "at most", "at most 5"),
        ([0], [1], "unknown", "unknown"),
        (range(5), [], "at least", "at least 5"),
    ],
)
def test_open_rays_make_a_bound(open_a, open_b, bound, words):
    found = compare_basins(basin(WIDE, open_a), basin(NARROW, open_b))
    assert found.bound == bound
    assert words in repr(found)
    assert all(math.isnan(end) for end in found.interval)
    assert math.isnan(found.ratio) == (bound == "unknown")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cutoff": 2.0}, "rim: cutoffs 1 and 2"),
        ({"dim": 99}, "parameters that rays move: 100 and 99"),
        ({"num_params": 7}, "parameters: 120 and 7"),
        ({"num_samples": 200}, "samples: 512 and 200"),
        ({"normalization": "none"}, "normalization of rays"),
        ({"mode": "batch"}, "mode of the network"),
    ],
)
def test_what_does_not_compare_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        compare_basins(basin(WIDE), basin(NARROW, **changes))


def test_other_things_are_refused():
    with pytest.raises(ValueError, match=r"a is 0\.3; give a result of basin_radii"):
        compare_basins(0.3, basin(WIDE))


def key_of(shown):
    """What the legend of basins says, of all texts of a figure; the last lines say Dot: ..."""
    return [t for t in shown if ": effective radius" in t and "Dot:" not in t]


def test_one_figure_has_both_and_their_ratio():
    found = compare_basins(basin(WIDE), basin(NARROW), names=("good", "bad"))
    figure = found.figure()
    shown = [t.get_text() for t in figure.texts]
    assert [t.split(":")[0] for t in key_of(shown)] == ["good", "bad"]
    assert any("good over bad: 5" in t for t in shown)
    # A title of one's own does not take the number away.
    shown = [t.get_text() for t in found.figure(title="mine").texts]
    assert "mine" in shown
    assert any("good over bad: 5" in t for t in shown)


# -- radii that say what they are ---------------------------------------------------------


def test_all_rays_open_is_at_least_and_never_plus_minus_nothing():
    found = basin_radii(
        tanh_net(), two_batches(), loss=lambda m, b: 0 * cross_entropy(m, b), num_rays=4
    )
    assert "effective at least 4 filter norms" in repr(found)
    assert "+-" not in repr(found)
    assert math.isnan(found.effective_radius_sem)
    assert math.isnan(found.log10_volume)
    assert math.isnan(_scalars(found)["log10_volume"])
    shown = [t.get_text() for t in found.figure().texts]
    (text,) = key_of(shown)
    assert "at least 4" in text
    assert "±" not in text


def test_some_rays_open_is_at_least_too():
    found = basin(WIDE, [0])
    assert "effective at least" in repr(found)
    assert found.at_least
    assert not basin(WIDE).at_least


@pytest.mark.parametrize("cutoff", ["0.5", True, math.nan, math.inf, [1.0]])
def test_a_cutoff_is_a_number(cutoff):
    with pytest.raises(ValueError, match=r"cutoff is .*give a loss, or None"):
        basin_radii(tanh_net(), two_batches(), loss=cross_entropy, cutoff=cutoff)


@pytest.mark.parametrize("setting", ["rise", "max_radius"])
def test_true_is_no_length(setting):
    with pytest.raises(ValueError, match=f"{setting} is True"):
        basin_radii(tanh_net(), two_batches(), loss=cross_entropy, **{setting: True})

"""Small statistics against scipy and scikit-learn."""

import math

import pytest
import scipy.stats
import torch
from sklearn.manifold import trustworthiness as sklearn_trustworthiness

from lla_callbacks.minima import statistics


@pytest.mark.parametrize("degrees", [1, 1.7, 3, 7, 30, 61, 500, 1e5])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_students_quantiles(degrees, level):
    expected = scipy.stats.t.ppf(0.5 + level / 2, degrees)
    assert statistics.student(degrees, level) == pytest.approx(expected, rel=2e-5)


def test_an_interval_of_a_mean():
    values = [1.0, 2.0, 4.0, 4.5]
    mean, low, high = statistics.mean_interval(values)
    found = scipy.stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx((2.875, found.low, found.high), rel=1e-5)
    assert math.isnan(statistics.mean_interval([1.0])[1])


def test_ranks_and_correlations_with_ties():
    source = torch.Generator().manual_seed(0)
    x, y, z = (torch.randint(0, 6, (25,), generator=source).double() for _ in range(3))
    assert statistics.ranks(x).tolist() == (scipy.stats.rankdata(x) - 1).tolist()
    expected = scipy.stats.spearmanr(x, y).statistic
    assert statistics.spearman(x, y) == pytest.approx(expected, rel=1e-12)
    # By its definition: the correlation of what is left of the ranks once z is fitted.
    ranks = [statistics.ranks(v) for v in (x, y, z)]
    ranks = [r - r.mean() for r in ranks]
    left = [r - (r @ ranks[2]) / (ranks[2] @ ranks[2]) * ranks[2] for r in ranks[:2]]
    found = statistics.partial_spearman(x, y, z)
    assert found == pytest.approx(float(left[0] @ left[1] / (left[0].norm() * left[1].norm())))
    assert math.isnan(statistics.spearman(x, torch.ones(25)))
    assert math.isnan(statistics.partial_spearman(x, y, y))


def test_a_bootstrap_covers_the_mean_as_often_as_it_says():
    """200 samples of 20: 95 % of intervals, off by at most five standard errors."""
    source = torch.Generator().manual_seed(1)
    inside = 0
    for k in range(200):
        sample = torch.randn(20, generator=source)
        low, high = statistics.bootstrap(20, lambda i, x=sample: x[i].mean(-1), seed=k, draws=400)
        inside += low <= 0 <= high
    # Percentile intervals of 20 are known to be a little narrow.
    assert 0.92 - 5 * math.sqrt(0.92 * 0.08 / 200) < inside / 200 <= 1.0
    assert all(math.isnan(end) for end in statistics.bootstrap(3, lambda i: i.sum(-1)))
    assert all(math.isnan(end) for end in statistics.bootstrap(9, lambda i: i.sum(-1) * math.nan))


@pytest.mark.parametrize("count", [5, 12, 40])
def test_trustworthiness_is_that_of_scikit_learn(count):
    x = torch.randn(count, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    distances = torch.cdist(x, x)
    k = min(5, (count - 1) // 2)
    expected = sklearn_trustworthiness(x.numpy(), x[:, :2].numpy(), n_neighbors=k)
    assert statistics.trustworthiness(distances, x[:, :2]) == pytest.approx(expected, rel=1e-12)
    assert statistics.trustworthiness(distances, x) == 1.0
    assert math.isnan(statistics.trustworthiness(distances[:4, :4], x[:4]))

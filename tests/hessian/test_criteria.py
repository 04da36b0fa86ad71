from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lla_callbacks.hessian import criteria

NODES = torch.tensor([-4.0, -1.0, 0.0, 9.0]).double()
WEIGHTS = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()


def test_values_by_hand() -> None:
    assert criteria.extreme_ratio(NODES) == pytest.approx(-4 / 9)
    assert criteria.negative_to_positive(NODES, WEIGHTS, 1.0) == pytest.approx(0.6 / 3.6)
    expected = (math.sqrt(0.4) + math.sqrt(0.2)) / math.sqrt(3.6)
    assert criteria.negative_to_positive(NODES, WEIGHTS, 0.5) == pytest.approx(expected)
    assert criteria.negative_mass(NODES, WEIGHTS) == pytest.approx(0.3)
    assert criteria.negative_mass_bound(NODES, WEIGHTS) == pytest.approx(0.3)
    assert criteria.effective_dimension(NODES, WEIGHTS, 10) == pytest.approx(10 * 0.4 * 0.9)


@pytest.mark.parametrize(("lowest", "expected"), [(-5.5, 0.0), (-5.3, 1.0), (2.0, 1.0)])
def test_the_spectrum_type_turns_at_the_published_threshold(lowest: float, expected: float) -> None:
    ratio = criteria.extreme_ratio(torch.tensor([lowest, 9.0]).double())
    assert criteria.mainly_positive(ratio) == expected


@pytest.mark.parametrize(
    "nodes", [torch.tensor([-2.0, -1.0]), torch.tensor([-1.0, 1e-9]), torch.zeros(2)]
)
def test_without_a_positive_part_the_ratios_are_nan(nodes: Tensor) -> None:
    weights = torch.tensor([0.5, 0.5]).double()
    assert math.isnan(criteria.extreme_ratio(nodes.double()))
    assert math.isnan(criteria.mainly_positive(math.nan))
    assert math.isnan(criteria.negative_to_positive(nodes.double(), weights, 0.5))


def test_rounding_around_zero_counts_for_neither_side() -> None:
    nodes = torch.tensor([-1e-9, 0.0, 1.0]).double()
    weights = torch.tensor([0.5, 0.25, 0.25]).double()
    assert criteria.negative_to_positive(nodes, weights, 0.5) == 0
    assert criteria.negative_mass(nodes, weights) == 0


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_splitting_a_node_shows_the_dependence_on_depth(power: float) -> None:
    split = torch.tensor([-4.0, -4.0, 9.0]).double(), torch.tensor([0.2, 0.2, 0.6]).double()
    whole = torch.tensor([-4.0, 9.0]).double(), torch.tensor([0.4, 0.6]).double()
    factor = criteria.negative_to_positive(*split, power) / criteria.negative_to_positive(
        *whole, power
    )
    # Two nodes for one multiply its share by 2^(1 - n): nothing for n = 1, sqrt(2) for KH05.
    assert factor == pytest.approx(2 ** (1 - power))

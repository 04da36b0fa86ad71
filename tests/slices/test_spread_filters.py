"""Directions of parameters taken one by one are those of all taken together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lla_callbacks.linalg import probes
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.objective.objective import trainable
from lla_callbacks.slices.filters import Filters
from lla_callbacks.slices.spread_filters import SpreadFilters, filters_of


@pytest.mark.parametrize("vectors", ["zero", "tensor", "entry"])
@pytest.mark.parametrize("normalization", ["filter", "layer", "weight", "none"])
def test_one_by_one_as_all_together(
    normalization: str, vectors: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "PIECE", 32)
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Linear(7, 5), nn.Linear(5, 1), nn.BatchNorm1d(3)
    )
    space = ParameterSpace(trainable(module))
    whole = Filters(module, space, normalization, vectors)
    parts = SpreadFilters(module, space, normalization, vectors)
    assert type(filters_of(module, space, normalization, vectors)) is Filters
    assert parts.num_moved() == whole.num_moved()
    found, expected = ((f.drawn(3, 2, 0), f.drawn(3, 2, 1)) for f in (parts, whole))
    assert torch.equal(torch.cat([p.reshape(-1) for p in found[0]]), expected[0])
    assert torch.equal(parts.scaled(found[1]), whole.scaled(expected[1]))
    # A flat vector, such as a moment, may be scaled too.
    assert torch.equal(parts.scaled(expected[0]), whole.scaled(expected[0]))
    turned = parts.orthogonal_to(*found)
    torch.testing.assert_close(turned, whole.orthogonal_to(*expected), rtol=1e-12, atol=1e-14)

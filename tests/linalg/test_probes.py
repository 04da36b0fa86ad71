from __future__ import annotations

import pytest
import torch

from lla_callbacks.linalg import probes
from lla_callbacks.linalg.probes import generator, signs

FLOAT = {"dtype": torch.float64, "device": torch.device("cpu")}


@pytest.mark.parametrize("dim", [0, 1, 7, 63, 64, 65, 1000])
def test_signs_are_signs_of_any_number(dim: int) -> None:
    z = signs(dim, generator(1), **FLOAT)
    assert z.shape == (dim,)
    assert set(z.tolist()) <= {-1.0, 1.0}
    assert torch.equal(z, signs(dim, generator(1), **FLOAT))


def test_signs_are_independent_and_even() -> None:
    """Means, and products of entries up to 130 apart, within 5 standard errors of zero."""
    dim = 200_000
    z = signs(dim, generator(2), **FLOAT)
    limit = 5 / dim**0.5
    assert abs(float(z.mean())) < limit
    for lag in range(1, 131):
        assert abs(float((z[lag:] * z[:-lag]).mean())) < 1.1 * limit, lag
    by_bit = z[: dim // 64 * 64].reshape(-1, 64).mean(0)
    assert by_bit.abs().max() < 5 / (dim // 64) ** 0.5


def test_signs_depend_on_the_seed() -> None:
    one, other = (signs(640, generator(seed), **FLOAT) for seed in (1, 2))
    assert abs(float((one * other).mean())) < 5 / 640**0.5


@pytest.mark.parametrize("dim", [1, 15, 16, 63, 64, 65, 79, 80, 200])
def test_normal_entries_drawn_in_pieces_are_those_of_one_draw(
    dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "PIECE", 64)
    whole = torch.randn(dim, generator=generator(5), dtype=torch.float64)
    pieces = list(probes.normal_pieces(dim, generator(5)))
    assert torch.equal(torch.cat(pieces), whole)
    assert max(map(len, pieces)) < 64 + 16

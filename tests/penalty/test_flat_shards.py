"""Pieces of FSDP1's flat parameters get the signs of the whole ones; two processes train so in
tests/callbacks/test_parallel.py."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lla_callbacks.penalty.flat_shards import flat_parts
from lla_callbacks.penalty.noise import Displacement
from tests.penalty.signs_by_hand import signs_by_hand


class FullyShardedDataParallel(nn.Module):
    """What is asked of torch's class of this name, for a process that has some entries of each."""

    def __init__(self, wholes, ranges):
        super().__init__()
        self._is_root = None
        pieces, infos = [], []
        for p, r in zip(wholes, ranges, strict=True):
            flattened = p.as_strided((p.numel(),), (1,))
            pieces.append(nn.Parameter(flattened[slice(*r)].clone() if r else torch.empty(0)))
            start, end = r or (None, 1)
            infos.append(
                SimpleNamespace(
                    in_shard=r is not None, intra_param_start_idx=start, intra_param_end_idx=end - 1
                )
            )
        flat = SimpleNamespace(
            _params=pieces,
            _shapes=[p.shape for p in wholes],
            _strides=[p.stride() for p in wholes],
            _contiguities=[p.is_contiguous() for p in wholes],
            _shard_param_infos=infos,
        )
        self._handle = SimpleNamespace(
            flat_param=flat, uses_sharded_strategy=True, process_group=None
        )


def test_pieces_have_the_signs_of_the_whole_in_any_layout():
    torch.manual_seed(0)
    wholes = {
        "rows": torch.randn(30, 7),
        "channels_last": torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
        "elsewhere": torch.randn(3),
        "all": torch.randn(5),
    }
    ranges = [(61, 140), (100, 217), None, (0, 5)]
    wrapped = nn.Sequential(FullyShardedDataParallel(wholes.values(), ranges))
    pieces = dict(zip(wholes, wrapped[0]._handle.flat_param._params, strict=True))
    known = flat_parts(wrapped)
    parts = {name: known[id(p)] for name, p in pieces.items()}
    assert [part.numel for part in parts.values()] == [210, 300, 3, 5]
    found = Displacement(pieces, parts=parts).signs((2,))
    expected = signs_by_hand(wholes, 0, (2,))
    for (name, whole), r in zip(wholes.items(), ranges, strict=True):
        z = torch.empty_like(whole).copy_(expected[name]).as_strided((whole.numel(),), (1,))
        assert torch.equal(found[name], z[slice(*r)] if r else torch.empty(0)), name


@pytest.mark.parametrize(
    ("name", "match"),
    [("_params", "Give use_orig_params=True"), ("_shapes", "in another way. Use torch's fully_sh")],
)
def test_what_cannot_be_told_apart_is_refused(name, match):
    wrapped = FullyShardedDataParallel([torch.ones(2)], [(0, 2)])
    if name == "_params":
        wrapped._handle.flat_param._params = None
    else:
        delattr(wrapped._handle.flat_param, name)
    with pytest.raises(ValueError, match=match):
        flat_parts(wrapped)

"""Weights that stand elsewhere: where, for whom, and that they come back as they were."""

import pytest
import torch
from torch import nn

from lla_callbacks.penalty import elsewhere
from lla_callbacks.penalty.elsewhere import Elsewhere


def weights():
    # Strides of a transposed and of a channels-last tensor, one entry, none.
    made = [torch.randn(3, 4).t(), torch.randn(2, 3, 4, 4), torch.tensor(-0.0), torch.randn(0, 2)]
    made[1] = made[1].to(memory_format=torch.channels_last)
    return [nn.Parameter(w) for w in made]


def moved(place, found):
    place.leave(found)
    for start, target in zip(place.starts, place.targets, strict=True):
        torch.add(start, 1.0, out=target)
    place.arrive()


@pytest.mark.parametrize("known", [True, False], ids=["pointed", "copied"])
def test_they_come_back_to_the_bit_and_in_their_own_memory(monkeypatch, known):
    if not known:  # a torch that does not tell
        monkeypatch.setattr(elsewhere, "_count_users", None)
    found, place = weights(), Elsewhere()
    kept = [w.detach().clone() for w in found]
    memory = [(w.data_ptr(), w.stride(), w._version) for w in found]
    for _ in range(2):
        with torch.no_grad():
            moved(place, found)
        assert place.is_away
        for w, k in zip(found, kept, strict=True):
            assert torch.equal(w, k + 1)
        away = [w.data_ptr() != m[0] for w, m in zip(found, memory, strict=True)]
        assert away == [known, known, known, False]
        with torch.no_grad():
            place.pause()
            assert all(torch.equal(w, k) for w, k in zip(found, kept, strict=True))
            for again, start, target in zip(
                place.resume(), place.starts, place.targets, strict=True
            ):
                if again:
                    torch.add(start, 1.0, out=target)
            place.arrive()
            assert all(torch.equal(w, k + 1) for w, k in zip(found, kept, strict=True))
            assert place.back() == []
        place.let_go()
        assert [(w.data_ptr(), w.stride(), w._version) for w in found] == memory
        for w, k in zip(found, kept, strict=True):
            assert torch.equal(w, k)
            assert torch.equal(w.signbit(), k.signbit())


def test_who_shares_the_memory_sees_where_the_weights_are():
    """A view, a state dict that is held, numpy, and the flat weights of a recurrent layer."""
    flat = torch.randn(12)
    shared = [nn.Parameter(flat[:4]), nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))]
    view, array = shared[1].detach()[1:], shared[2].detach().numpy()
    seen = [t.clone() for t in (flat[:4], view, torch.from_numpy(array))]
    place = Elsewhere()
    with torch.no_grad():
        moved(place, shared)
    for now, before in zip((flat[:4], view, torch.from_numpy(array)), seen, strict=True):
        assert torch.equal(now, before + 1)
    place.back()
    assert torch.equal(flat[:4], seen[0])
    layer = nn.Linear(2, 2)
    held = layer.state_dict()
    with torch.no_grad():
        moved(place, list(layer.parameters()))
        assert torch.equal(held["weight"], layer.weight)
        place.back()


@pytest.mark.parametrize("known", [True, False], ids=["pointed", "copied"])
def test_who_changes_one_meanwhile_is_told(monkeypatch, known):
    if not known:
        monkeypatch.setattr(elsewhere, "_count_users", None)
    found, place = weights(), Elsewhere()
    with torch.no_grad():
        moved(place, found)
        found[1].mul_(2)
        assert place.back() == [1]
        assert place.back() == []


def write_data(w):
    w.data.clamp_(-0.1, 0.1)


def write_numpy(w):
    w.detach().numpy()[:] = 0


def write_in_place(w):
    with torch.no_grad():
        w.mul_(2)


def replace_data(w):
    w.data = torch.zeros_like(w)


def read(w):
    torch.autograd.grad(nn.functional.linear(torch.ones(2, 300), w).sum(), w)


@pytest.mark.parametrize("use", [read, write_data, write_numpy, write_in_place, replace_data])
def test_only_what_nobody_wrote_is_mirrored(use):
    """And what was written is neither taken for the target nor lost with it."""
    found, place = [nn.Parameter(torch.randn(200, 300)), nn.Parameter(torch.randn(3))], Elsewhere()
    kept = [w.detach().clone() for w in found]
    with torch.no_grad():
        place.leave(found)
        for start, target in zip(place.starts, place.targets, strict=True):
            torch.add(start, 0.01, out=target)
        place.arrive([0])
    memory = place.targets[0].data_ptr() if use is write_data else None
    use(found[0])
    with torch.no_grad():
        assert not place.mirror(1)
        if place.mirror(0):
            assert use is read
            torch.testing.assert_close(place.targets[0], kept[0] - 0.01, rtol=0, atol=2e-6)
        else:
            assert use is not read or elsewhere._lazy is None
            torch.testing.assert_close(place.targets[0], kept[0] + 0.01, rtol=0, atol=0)
        place.arrive()
        assert torch.equal(found[0], place.targets[0])
        assert not place.mirror(0)
        place.back()
    assert all(torch.equal(w, k) for w, k in zip(found, kept, strict=True))
    assert memory is None or place.targets[0].data_ptr() == memory

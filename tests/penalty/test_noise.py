"""Weights with noise: which signs, back to the bit, bias and variance of the gradient there."""

import itertools
import math

import pytest
import torch
from torch.func import functional_call, hessian

from lla_callbacks.penalty import moving, noise_signs
from lla_callbacks.penalty.noise import Displacement

from .signs_by_hand import signs_by_hand


def some_parameters():
    source = torch.Generator().manual_seed(0)
    shapes = {"a": (7, 30), "b": (), "c.weight": (2, 3, 5, 5), "d": (129,), "e": (1, 70), "f": (0,)}
    made = {n: torch.randn(s, generator=source) for n, s in shapes.items()}
    made["c.weight"] = made["c.weight"].to(memory_format=torch.channels_last)
    made["g"] = torch.randn(3, 67, generator=source, dtype=torch.float64).t()
    return made


@pytest.mark.parametrize("piece", [noise_signs.PIECE, 100, 1])
def test_signs_are_those_of_each_element_however_they_are_drawn(monkeypatch, piece):
    monkeypatch.setattr(noise_signs, "PIECE", piece)
    parameters = some_parameters()
    found = Displacement(parameters, seed=3).signs((5, 1))
    for name, z in signs_by_hand(parameters, 3, (5, 1)).items():
        assert torch.equal(found[name], z), name


def test_signs_depend_on_the_parameter_alone_not_on_its_wrappers():
    weight = torch.zeros(100)
    names = ["net.weight", "_orig_mod.net.weight", "net._checkpoint_wrapped_module.weight"]
    drawn = [next(iter(Displacement({n: weight}).signs((1,)).values())) for n in names]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    others = Displacement({"bias": torch.zeros(7), "net.weight": weight}, seed=0)
    assert torch.equal(others.signs((1,))["net.weight"], drawn[0])
    for other in (Displacement({"net.weight": weight}, seed=1).signs((1,)), others.signs((2,))):
        assert not torch.equal(other["net.weight"], drawn[0])


def test_signs_are_fair_and_independent():
    n = 40_000
    rows = [Displacement({"w": torch.zeros(n)}).signs((k,))["w"].double() for k in range(8)]
    z = torch.stack(rows)
    # Means of n signs, and of products of neighbours, words, keys: five standard errors.
    for product in (z, z[:, 1:] * z[:, :-1], z[:, 64:] * z[:, :-64], z[1:] * z[:-1]):
        assert float(product.mean(1).abs().max()) < 5 / math.sqrt(n - 64)


@pytest.mark.parametrize("pieces", [None, (100, 24)], ids=["whole", "in pieces"])
@pytest.mark.parametrize("relative", [False, True])
def test_weights_move_by_sigma_and_come_back_to_the_bit(monkeypatch, relative, pieces):
    if pieces:
        monkeypatch.setattr(noise_signs, "PIECE", pieces[0])
        monkeypatch.setattr(moving, "PIECE", pieces[1])
    parameters = {n: torch.nn.Parameter(p) for n, p in some_parameters().items()}
    before = {n: p.detach().clone() for n, p in parameters.items()}
    pointers = {n: p.data_ptr() for n, p in parameters.items()}
    moved = Displacement(parameters, relative=relative)
    z = signs_by_hand(parameters, 0, (4,))
    for distance in (1e-3, -1e-3):
        moved.move(distance, (4,))
        assert moved.is_displaced
        for n, p in parameters.items():
            size = before[n].square().mean().sqrt() if relative and p.numel() else 1.0
            expected = before[n] + distance * size * z[n]
            assert torch.allclose(p.detach(), expected, rtol=1e-6, atol=1e-9), n
        # From the same place, were it called again, and to the other side.
        again = {n: p.detach().clone() for n, p in parameters.items()}
        moved.move(distance, (4,))
        assert all(torch.equal(p, again[n]) for n, p in parameters.items())
    assert moved.put_back() == []
    for n, p in parameters.items():
        one, other = (t.detach().contiguous().view(-1).view(torch.uint8) for t in (p, before[n]))
        assert torch.equal(one, other), n
        assert (p.data_ptr(), p._version, p.stride()) == (pointers[n], 0, before[n].stride())


def test_who_changed_a_weight_meanwhile_is_named():
    parameters = {"a": torch.nn.Parameter(torch.ones(3)), "b": torch.nn.Parameter(torch.ones(3))}
    moved = Displacement(parameters)
    moved.move(0.1, (0,))
    with torch.no_grad():
        parameters["b"].mul_(2)
    assert moved.put_back() == ["b"]
    assert torch.equal(parameters["b"].detach(), torch.ones(3))


# -- bias and variance ----------------------------------------------------------------------


class Quartic(torch.nn.Module):
    """A polynomial of fourth degree in two tensors, with every mixed derivative."""

    def __init__(self):
        super().__init__()
        source = torch.Generator().manual_seed(1)
        self.a = torch.nn.Parameter(torch.randn(2, 2, generator=source, dtype=torch.float64))
        self.b = torch.nn.Parameter(torch.randn(2, generator=source, dtype=torch.float64))
        self.c = torch.randn(6, 6, generator=source, dtype=torch.float64)
        self.d = torch.randn(6, generator=source, dtype=torch.float64)

    def forward(self):
        w = torch.cat([self.a.reshape(-1), self.b])
        u = self.c @ w
        return (u[:3] * u[3:]).sum() ** 2 / 50 + (self.d * w).sum() ** 3 / 6 + (u * self.d).sum()


def flat_gradient(module):
    module.zero_grad()
    module().backward()
    return torch.cat([p.grad.reshape(-1) for p in module.parameters()])


def exact_terms(module):
    """Gradient, Hessian and the gradient of its trace, by autodiff of the flat function."""
    sizes = {n: (p.shape, p.numel()) for n, p in module.named_parameters()}

    def loss(w):
        parts, start = {}, 0
        for n, (shape, size) in sizes.items():
            parts[n] = w[start : start + size].reshape(shape)
            start += size
        return functional_call(module, parts, ())

    w = torch.cat([p.detach().reshape(-1) for p in module.parameters()]).requires_grad_()
    third = torch.autograd.functional.jacobian(hessian(loss), w)
    gradient = torch.autograd.functional.jacobian(loss, w)
    return gradient, hessian(loss)(w).detach(), third.detach()


def displaced_gradients(module, z_of, sigma):
    """The gradients at both signs of some z."""
    kept = [p.detach().clone() for p in module.parameters()]
    found = []
    for distance in (sigma, -sigma):
        start = 0
        for p, w in zip(module.parameters(), kept, strict=True):
            p.data = w + distance * z_of[start : start + w.numel()].reshape(w.shape)
            start += w.numel()
        found.append(flat_gradient(module).clone())
    for p, w in zip(module.parameters(), kept, strict=True):
        p.data = w
    return found


@pytest.mark.parametrize("strength", [1e-4, 1e-2, 1.0])
def test_bias_and_variance_over_all_signs(strength):
    """Mean and covariance of the one-sided gradient, by all 64 vectors of signs."""
    module = Quartic()
    g, h, t = exact_terms(module)
    sigma = math.sqrt(2 * strength)
    rows = []
    for z in itertools.product([-1.0, 1.0], repeat=6):
        z = torch.tensor(z, dtype=torch.float64)
        up, down = displaced_gradients(module, z, sigma)
        # Both signs: loss and penalty along this z, exact for fourth degree.
        form = torch.einsum("ijk,i,j->k", t, z, z)
        assert torch.allclose((up + down) / 2, g + strength * form, rtol=1e-9, atol=1e-9)
        rows.append(up)
    found = torch.stack(rows)
    trace = torch.einsum("iik->k", t)
    assert torch.allclose(found.mean(0), g + strength * trace, rtol=1e-9, atol=1e-9)
    # First order in sigma: 2 strength (H^2)_kk. That of the two-sided form comes on top, and of
    # two steps with both signs only that is left.
    two_sided = 2 * ((t**2).sum((0, 1)) - torch.einsum("iik->ik", t).square().sum(0))
    one = 2 * strength * (h @ h).diagonal()
    if strength <= 1e-4:  # where the next order is small
        variance = found.var(0, correction=0)
        assert torch.allclose(variance, one + strength**2 * two_sided, rtol=0.02)


def test_both_signs_give_gradient_penalty_and_loss():
    """What two steps with one z add up to, and what is logged of them."""
    module = Quartic()
    g, h, t = exact_terms(module)
    moved = Displacement(dict(module.named_parameters()), seed=4)
    sigma, here = 0.1, module().item()
    gradient, slopes, losses = torch.zeros(6, dtype=torch.float64), [], []
    for distance in (sigma, -sigma):
        moved.move(distance, (7,))
        gradient += flat_gradient(module) / 2
        losses.append(module().item())
        slopes.append(float(moved.slope([p.grad for p in module.parameters()])) / 2)
        moved.put_back()
    z = torch.cat([x.reshape(-1) for x in moved.signs((7,)).values()])
    form = torch.einsum("ijk,i,j->k", t, z, z)
    assert torch.allclose(gradient, g + sigma**2 / 2 * form, rtol=1e-9, atol=1e-9)
    penalty = sigma**2 / 2 * float(z @ h @ z)
    # sigma^4 / 24 times the fourth derivative along z, which is all there is beyond.
    fourth = sum(losses) / 2 - here - penalty
    assert abs(fourth) > 1e-4 * abs(penalty)
    assert sum(slopes) / 2 == pytest.approx(penalty + 2 * fourth, rel=1e-9)
    assert (sum(losses) - sum(slopes)) / 2 == pytest.approx(here - fourth, rel=1e-9)


@pytest.mark.parametrize("zero", [False, True])
def test_relative_gradients_are_those_of_the_loss_at_moved_weights(zero):
    """By autodiff through theta + sigma rms(theta) z itself."""
    module = Quartic()
    if zero:
        module.b.data.zero_()
    moved = Displacement(dict(module.named_parameters()), relative=True)
    z = moved.signs((3,))
    leaves = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}
    parts = {
        n: w + 0.2 * z[n] * (w.square().mean().sqrt() if bool(w.any()) else 0.0)
        for n, w in leaves.items()
    }
    functional_call(module, parts, ()).backward()
    moved.move(0.2, (3,))
    module.zero_grad()
    module().backward()
    moved.put_back()
    moved.pull_back([p.grad for p in module.parameters()])
    for n, p in module.named_parameters():
        assert torch.allclose(p.grad, leaves[n].grad, rtol=1e-10, atol=1e-12), n

"""The plane through three networks: where they lie, what the loss is there, what is drawn."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from lla_callbacks import Curve, LossPlane, loss_plane
from lla_callbacks.curves.curve import coefficients
from lla_callbacks.slices.networks import network_plane
from tests.curves.curve_cases import batches, loss, norm_net, tanh_net, value


def curve(kind: Any = "bezier", bends: int = 1) -> Curve:
    return Curve(tuple(dict(tanh_net(k).named_parameters()) for k in range(bends + 2)), kind)


def mean_loss(module: Any) -> float:
    return sum(value(module, batch) for batch in batches()) / 3


def test_three_networks_have_their_own_losses() -> None:
    a, b, c, net = map(tanh_net, (1, 2, 3, 4))
    before = copy.deepcopy(net.state_dict())
    marks = network_plane(net, [a, b, c], "batch").marks
    (_, (width, zero), (x, y)) = marks.points.tolist()
    assert marks.points[0].tolist() == [0, 0]
    assert zero == pytest.approx(0, abs=1e-14)
    plane = loss_plane(
        net, batches(), directions=[a, b.state_dict(), c], loss=loss, betas=[0, y],
        alphas=sorted([0, width, x]),
    )  # fmt: skip
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    alphas = plane.alphas.tolist()
    # The origin is the first network to the bit; the others to rounding.
    assert float(plane.loss[alphas.index(0), 0]) == mean_loss(a) == plane.centre_loss
    assert float(plane.loss[alphas.index(width), 0]) == pytest.approx(mean_loss(b), rel=1e-12)
    assert float(plane.loss[alphas.index(x), 1]) == pytest.approx(mean_loss(c), rel=1e-12)
    assert plane.networks is not None
    assert plane.networks.loss.tolist() == [mean_loss(n) for n in (a, b, c)]
    assert plane.networks.residuals.tolist() == [0, 0, 0]
    u, v = (d.vector for d in plane.directions)
    assert float(u @ v) == pytest.approx(0, abs=1e-15)
    assert [float(u.norm()), float(v.norm())] == pytest.approx([1, 1], abs=1e-14)


@pytest.mark.parametrize("kind", ["bezier", "chain"])
def test_a_curve_with_one_bend_lies_in_its_plane(kind: Any) -> None:
    plane = loss_plane(
        tanh_net(4), batches(), directions=curve(kind), loss=loss, alphas=[0, 1], betas=[0, 1]
    )
    marks = plane.networks
    assert marks is not None
    assert marks.names == ("start", "bend", "end")
    expected = [
        sum(c * p for c, p in zip(coefficients(kind, 3, k / 100), marks.points, strict=True))
        for k in range(101)
    ]
    torch.testing.assert_close(marks.curve, torch.stack(expected), rtol=0, atol=1e-12)
    assert float(marks.residuals.max()) == 0


def test_more_bends_are_projected_and_said() -> None:
    plane = loss_plane(tanh_net(4), batches(), directions=curve(bends=3), loss=loss,
                       alphas=[0, 1], betas=[0, 1])  # fmt: skip
    marks = plane.networks
    assert marks is not None
    assert marks.names == ("start", "bend 1", "bend 2", "bend 3", "end")
    assert float(marks.residuals[1:-1].min()) > 0.1
    assert marks.residuals[[0, -1]].tolist() == [0, 0]
    figure = plane.figure()
    assert "off the plane are projected" in figure.get_supxlabel()


def test_what_is_drawn_and_saved(tmp_path: Any) -> None:
    plane = loss_plane(tanh_net(4), batches(), directions=curve(), loss=loss)
    assert plane.loss.shape == (21, 21)
    marks = plane.networks
    assert marks is not None
    shown = torch.cat([marks.points, marks.curve])
    for k, axis in enumerate((plane.alphas, plane.betas)):
        assert float(axis[0]) < float(shown[:, k].min())
        assert float(shown[:, k].max()) < float(axis[-1])
    again = LossPlane.load(plane.save(tmp_path / "plane.npz"))
    assert again.networks is not None
    for name, kept in vars(marks).items():
        found = getattr(again.networks, name)
        assert torch.equal(found, kept) if isinstance(kept, torch.Tensor) else found == kept
    # The legend, in the order in which it is written above the axes.
    texts = [t.get_text().split(":")[0] for t in plane.figure().texts]
    assert [t for t in texts if t in ("curve", *marks.names)] == ["curve", "start", "bend", "end"]


def test_planes_that_cannot_be_are_refused() -> None:
    a, b, net = map(tanh_net, (1, 2, 4))
    middle = copy.deepcopy(a)
    middle.load_state_dict(
        {n: torch.lerp(p, b.state_dict()[n], 0.3) for n, p in a.state_dict().items()}
    )
    with pytest.raises(ValueError, match="the three networks lie on a line"):
        loss_plane(net, batches(), directions=[a, b, middle], loss=loss)
    with pytest.raises(ValueError, match="the curve has no bend"):
        loss_plane(net, batches(), directions=curve(bends=0), loss=loss)
    with pytest.raises(ValueError, match=r"network 2 lacks '0.weight'"):
        loss_plane(net, batches(), directions=[a, b, {}], loss=loss)
    norms = [norm_net(k) for k in range(4)]
    with pytest.raises(ValueError, match="give mode='recalibrate' or 'batch'"):
        loss_plane(norms[3], batches(), directions=norms[:3], loss=loss, mode="eval")
    found = loss_plane(norms[3], batches(), directions=norms[:3], loss=loss, mode="recalibrate",
                       alphas=[0, 1], betas=[0, 1])  # fmt: skip
    assert bool(found.loss.isfinite().all())

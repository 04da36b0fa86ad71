"""Distances between networks, and pictures that are worth what they say."""

import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from tensorboard.plugins import projector
from torch.utils.tensorboard import SummaryWriter

from lla_callbacks import map_of_minima
from lla_callbacks.minima import maps

from .minima_cases import data, net

BATCHES = [data(), data(16, seed=8)]


def networks(count=6, **settings):
    return [net(seed, **settings) for seed in range(count)]


def shares(module):
    module.eval()
    with torch.no_grad():
        return torch.cat([module(b[0]).softmax(1) for b in BATCHES])


def test_distances_are_by_their_definitions():
    found = networks(3, norm=True)
    p = [shares(m) for m in found]
    for m in found:
        m.train()
    hellinger = map_of_minima(found, BATCHES).distances
    labels = map_of_minima(found, BATCHES, distance="disagreement").distances
    weights = map_of_minima(found, distance="weights").distances
    flat = [torch.cat([w.detach().reshape(-1) for w in m.parameters()]) for m in found]
    scale = sum(float(w.norm()) for w in flat) / 3
    for i in range(3):
        for j in range(3):
            # 1 - sum sqrt(p q), a sample at a time.
            square = (1 - (p[i] * p[j]).sqrt().sum(1)).clamp(min=0).mean()
            # A square root of a difference of numbers near 1.
            assert float(hellinger[i, j]) == pytest.approx(float(square) ** 0.5, abs=3e-8)
            share = float((p[i].argmax(1) != p[j].argmax(1)).double().mean())
            assert float(labels[i, j]) == pytest.approx(share, abs=1e-12)
            expected = float((flat[i] - flat[j]).norm()) / scale
            assert float(weights[i, j]) == pytest.approx(expected, rel=1e-12)
    assert all(m.training for net in found for m in net.modules())


def test_classical_scaling_returns_points_of_the_plane():
    plane = torch.randn(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores, explained = maps.scaled(torch.cdist(plane, plane), 2)
    torch.testing.assert_close(torch.cdist(scores, scores), torch.cdist(plane, plane))
    assert explained == pytest.approx(1.0)


def test_principal_components_are_those_of_scikit_learn():
    x = torch.randn(8, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, explained = maps.picture(x, maps.distances_of(x, "weights"), "pca", perplexity=None,
                                    seed=0)  # fmt: skip
    pca = PCA(2).fit(x.numpy())
    expected = torch.from_numpy(pca.transform(x.numpy()))
    torch.testing.assert_close(found.abs(), expected.abs())
    assert explained == pytest.approx(float(pca.explained_variance_ratio_.sum()))
    # Of Euclidean distances classical scaling is the same picture.
    torch.testing.assert_close(found, maps.scaled(torch.cdist(x, x), 2)[0])


@pytest.mark.parametrize("method", ["mds", "pca", "tsne"])
@pytest.mark.parametrize("distance", ["predictions", "disagreement", "weights"])
def test_a_map_says_what_it_is_worth_and_is_the_same_again(method, distance):
    sets = {"path": networks(4), "bad": networks(3)}
    settings = {"distance": distance, "method": method, "path": "path", "seed": 3}
    found = map_of_minima(sets, BATCHES, values=range(7), values_name="accuracy", **settings)
    again = map_of_minima(sets, BATCHES, **settings)
    assert torch.equal(found.coordinates, again.coordinates)
    assert found.coordinates.shape == (7, 2)
    assert found.sets == ("path",) * 4 + ("bad",) * 3
    assert found.names[:2] == ("path 0", "path 1")
    figure = found.figure()
    shown, below = [t.get_text() for t in figure.texts], figure.get_supxlabel()
    assert f"trustworthiness {found.trustworthiness:.2f}" in shown
    assert f"rank correlation {found.rank_correlation:.2f}" in shown
    assert {"path", "bad"} <= {*shown}
    assert ("mean nothing" in below) == (method == "tsne")
    assert math.isnan(found.explained) == (method == "tsne")


def test_state_dicts_and_checkpoints_are_networks_too():
    found = networks(4, norm=True)
    host = net(9, norm=True)
    before = {k: v.clone() for k, v in host.state_dict().items()}
    dicts = [found[0].state_dict(), {"state_dict": found[1].state_dict()}, *found[2:]]
    expected = map_of_minima(found, BATCHES)
    assert torch.equal(map_of_minima(dicts, BATCHES, module=host).distances, expected.distances)
    assert all(torch.equal(v, before[k]) for k, v in host.state_dict().items())


def test_the_path_is_joined_and_colours_are_the_users():
    found = map_of_minima({"path": networks(3), "bad": networks(2)}, BATCHES, path="path",
                          values=[1, 2, 3, 4, math.nan])  # fmt: skip
    axes = found.figure().axes[0]
    np.testing.assert_allclose(axes.lines[0].get_xydata(), found.coordinates[:3].numpy())
    assert len(axes.collections) == 2
    assert axes.collections[0].get_array().tolist() == [1, 2, 3]


def test_the_projector_gets_at_most_fifty_columns(tmp_path):
    found = map_of_minima({"a": networks(30), "b": networks(30)}, BATCHES, values=range(60),
                          distance="weights")  # fmt: skip
    assert found.scores.shape == (60, 50)
    with SummaryWriter(tmp_path) as writer:
        found.write_projector(writer, step=4)
    (table,) = tmp_path.glob("**/tensors.tsv")
    (labels,) = tmp_path.glob("**/metadata.tsv")
    rows = [row.split("\t") for row in table.read_text().splitlines()]
    assert (len(rows), len(rows[0])) == (60, 50)
    assert labels.read_text().splitlines()[:2] == ["name\tset\tvalue", "a 0\ta\t0.0"]
    assert projector is not None
    with pytest.raises(ValueError, match="object has no projector"):
        found.write_projector(object())


@pytest.mark.parametrize(
    ("arguments", "settings", "words"),
    [
        ((networks(2), BATCHES), {}, "give three at least"),
        ((networks(3), data()), {}, r"is one batch.*\[batch\]"),
        ((networks(3),), {}, "batches is empty"),
        ((networks(3), BATCHES), {"distance": "angle"}, "distance is 'angle'"),
        ((networks(3), BATCHES), {"method": "umap"}, "method is 'umap'"),
        ((networks(3), BATCHES), {"values": [1.0]}, "values has 1 numbers for 3"),
        ((networks(3), BATCHES), {"path": "good"}, "path is 'good'"),
        ((networks(3), BATCHES), {"mode": "recalibrate"}, "mode is 'recalibrate'"),
        ((networks(4), BATCHES), {"method": "tsne", "perplexity": 9}, "perplexity is 9"),
        (([{}, {}, {}], BATCHES), {}, "give modules, or state dicts and module="),
        (([{}, *networks(2)], BATCHES), {"module": net()}, "'0.weight' is missing"),
        (([0, *networks(2)], BATCHES), {"module": net()}, "of type int; give a module"),
        ((net(), BATCHES), {}, "give a list of networks"),
        (([torch.nn.Linear(3, 2).double(), *networks(2)],), {"distance": "weights"}, "sizes"),
    ],
)
def test_what_makes_no_map_is_refused(arguments, settings, words):
    with pytest.raises(ValueError, match=words):
        map_of_minima(*arguments, **settings)


def test_tsne_without_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.manifold", None)
    with pytest.raises(ImportError, match="pip install scikit-learn, or take method='mds'"):
        map_of_minima(networks(5), BATCHES, method="tsne")

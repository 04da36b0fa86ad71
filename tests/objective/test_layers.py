"""Which parameters make up which layer, by default, by name, pattern and predicate."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.objective.layers import layer_parameters, outside
from lla_callbacks.objective.objective import trainable
from tests.cases import Attention, Tied


class Block(nn.Module):
    """A residual block: two convolutions with norms, and a shortcut in a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2)
        self.conv2, self.bn2 = nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2)
        self.downsample = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)
        self.layer1 = nn.Sequential(Block(), Block())
        self.layer2 = nn.Sequential(Block())
        self.fc = nn.Linear(2, 3)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.position = nn.Parameter(torch.zeros(3, 4))
        layer = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(4), enable_nested_tensor=False)
        self.head = nn.Linear(4, 3)


class Mixer(nn.Module):
    """Has a block in each of its blocks: the outer ones count."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.inner = nn.ModuleList(Block() for _ in range(depth))


def grouped(module: nn.Module, layers: object = None) -> dict[str, list[str]]:
    return layer_parameters(module, ParameterSpace(trainable(module)), layers)  # type: ignore[arg-type]


def test_by_default_every_owner_is_a_layer() -> None:
    groups = grouped(Transformer())
    assert groups["embed"] == ["embed.weight"]
    assert groups["position"] == ["position"]
    assert groups["encoder.layers.0.linear1"] == [
        "encoder.layers.0.linear1.weight",
        "encoder.layers.0.linear1.bias",
    ]
    assert groups["encoder.layers.0.self_attn.out_proj"] == [
        "encoder.layers.0.self_attn.out_proj.weight",
        "encoder.layers.0.self_attn.out_proj.bias",
    ]


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (ResNet(), ["conv1", "bn1", "layer1.0", "layer1.1", "layer2.0", "fc"]),
        (
            Transformer(),
            ["position", "embed", "encoder.layers.0", "encoder.layers.1", "encoder.norm", "head"],
        ),
        (nn.ModuleDict({"a": Block(), "b": Block()}), ["a", "b"]),
        # Stages are rows of blocks, no blocks.
        (
            nn.Sequential(nn.Sequential(Block(), Block()), nn.Sequential(Block())),
            ["0.0", "0.1", "1.0"],
        ),
        # Blocks within blocks, and a whole network in a Sequential, which no one repeats.
        (nn.Sequential(Mixer(1), Mixer(2)), ["0", "1"]),
        (nn.Sequential(Mixer(2), nn.Linear(2, 2)), ["0.inner.0", "0.inner.1", "1"]),
        (
            nn.Sequential(*(nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1)) for _ in "ab")),
            ["0", "1"],
        ),
        # Plain layers in a row are what they are.
        (
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3)),
            ["0", "1", "2"],
        ),
    ],
    ids=["resnet", "transformer", "ModuleDict", "stages", "nested", "wrapped", "rows", "plain"],
)
def test_blocks_are_what_a_reader_would_name(module: nn.Module, expected: list[str]) -> None:
    groups = grouped(module, "blocks")
    assert list(groups) == expected
    # Every parameter is in one layer.
    names = [name for names in groups.values() for name in names]
    assert sorted(names) == sorted(trainable(module))


def test_attention_and_parametrized_modules_are_not_taken_apart() -> None:
    groups = grouped(Attention(), "blocks")
    assert groups["layer.self_attn"] == [
        f"layer.self_attn.{name}"
        for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    ]
    normed = nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 2)), nn.Linear(2, 2))
    assert list(grouped(normed, "blocks")) == ["0", "1"]
    assert list(grouped(normed)) == ["0", "0.parametrizations.weight", "1"]


def test_frozen_and_tied_parameters_stay_out() -> None:
    module = ResNet()
    module.layer1.requires_grad_(False)
    module.layer2[0].bn1.requires_grad_(False)
    groups = grouped(module, "blocks")
    assert list(groups) == ["conv1", "bn1", "layer2.0", "fc"]
    assert "layer2.0.bn1.weight" not in groups["layer2.0"]
    # A tied weight belongs to its first name.
    assert grouped(Tied())["b"] == ["b.bias"]


def test_a_pattern_takes_the_outermost_of_nested_matches() -> None:
    assert list(grouped(ResNet(), ["layer*"])) == ["layer1", "layer2"]
    assert list(grouped(ResNet(), "layer?.?.conv1")) == [
        f"{block}.conv1" for block in ("layer1.0", "layer1.1", "layer2.0")
    ]
    assert list(grouped(ResNet(), "fc")) == ["fc"]


def test_a_predicate_gets_path_and_module() -> None:
    found = grouped(ResNet(), lambda path, module: isinstance(module, nn.Conv2d))
    assert list(found)[:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    outermost = grouped(ResNet(), lambda path, module: path.startswith("layer1"))
    assert list(outermost) == ["layer1"]
    assert len(outermost["layer1"]) == 24


def test_what_belongs_to_no_layer_is_known() -> None:
    module = ResNet()
    space = ParameterSpace(trainable(module))
    groups = layer_parameters(module, space, ["layer*", "fc"])
    assert outside(space, groups) == ["conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias"]
    assert outside(space, layer_parameters(module, space, "blocks")) == []


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("nowhere", r"'nowhere', which matches no module.*are: conv1, bn1.*by name: blocks"),
        (["layer1", "layer1.0"], "overlap: 'layer1.0.conv1.weight' would belong to two"),
        (lambda path, module: False, "predicate that is true for no module.*are: conv1"),
        ([], r"layers is \[\]; give a module path.*\('blocks'\), a predicate"),
        ([3], r"layers is \[3\]; give a module path"),
        (b"fc", "layers is b'fc'"),
    ],
)
def test_mistakes_name_what_was_given_and_what_is_allowed(layers: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grouped(ResNet(), layers)

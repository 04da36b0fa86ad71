"""Networks and batches that the benchmarks share."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a parameter-free shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.pad = (outputs - inputs) // 2
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(out + F.pad(shortcut, (0, 0, 0, 0, self.pad, self.pad)))


class ResNet20(nn.Module):
    """ResNet-20 for 32x32 images, 269,722 parameters (He et al. 2016, section 4.2)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(BasicBlock(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(
            *(BasicBlock(16 if i == 0 else 32, 32, 2 - (i > 0)) for i in range(3))
        )
        self.layer3 = nn.Sequential(
            *(BasicBlock(32 if i == 0 else 64, 64, 2 - (i > 0)) for i in range(3))
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean(dim=(2, 3)))


def conv_3c3d() -> nn.Sequential:
    """DeepOBS's 3c3d for 32x32 images, 895,210 parameters (Schneider et al. 2019, appendix)."""

    def pool() -> nn.MaxPool2d:
        # Rounding up is what TensorFlow's "same" padding gives for these sizes: 14, 6, 3.
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    return nn.Sequential(
        nn.Conv2d(3, 64, 5), nn.ReLU(), pool(),
        nn.Conv2d(64, 96, 3), nn.ReLU(), pool(),
        nn.Conv2d(96, 128, 3, padding=1), nn.ReLU(), pool(), nn.Flatten(),
        nn.Linear(1152, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10),
    )  # fmt: skip


class SmallTransformer(nn.Module):
    """A pre-norm transformer that reads an 8x8 image row by row, 4 layers."""

    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(torch.randn(8, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x.reshape(-1, 8, 8)) + self.position).mean(dim=1))


def mlp() -> nn.Sequential:
    """A tanh network on 8x8 images, 64-256-256-10."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 256),
        nn.Tanh(),
        nn.Linear(256, 256),
        nn.Tanh(),
        nn.Linear(256, 10),
    )


def conv_bn() -> nn.Sequential:
    """The demo's kind of network: two convolutions with batch norm, 8x8 images."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def digits(count: int) -> tuple[Tensor, Tensor]:
    """The first images of scikit-learn's digits, ``(count, 1, 8, 8)`` in [0, 1]."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[:count] / 16.0, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return x, torch.tensor(labels[:count])


def cifar10(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """The first training images, normalised as the pretrained ResNet-20 expects."""
    with np.load(next(folder.glob("*.npz"))) as arrays:
        images, labels = arrays["train_images"][:count], arrays["train_labels"][:count]
    x = torch.tensor(images / 255.0, dtype=torch.float32).permute(0, 3, 1, 2)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    return (x - mean) / std, torch.tensor(labels.astype(np.int64)).reshape(-1)


def mnist(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """The first test images, ``(count, 1, 28, 28)`` in [0, 1]."""
    images = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:]
    x = np.frombuffer(images, np.uint8).reshape(-1, 1, 28, 28)[:count] / 255.0
    y = np.frombuffer(labels, np.uint8)[:count].astype(np.int64)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y)

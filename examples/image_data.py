"""Small image sets: scikit-learn's digits, or MNIST, Fashion-MNIST, CIFAR-10 from a folder."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset


def load_images(folder: Path | None) -> tuple[TensorDataset, TensorDataset]:
    """Return training and test images ``(N, C, H, W)`` in [0, 1] with labels.

    Args:
        folder: Holds the idx files of MNIST or Fashion-MNIST (``*-ubyte`` or ``.gz``), the
            python batches of CIFAR-10 (``data_batch_1`` ...), or one .npz file with
            ``train_images``, ``train_labels`` and ``test_*`` or ``heldout_*``. ``None``
            takes the digits that scikit-learn carries: 1,797 real 8x8 images.
    """
    if folder is None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        images = images.reshape(-1, 8, 8) / 16.0
        return _dataset(images[:1437], labels[:1437]), _dataset(images[1437:], labels[1437:])
    if not folder.is_dir():
        raise SystemExit(f"--data {folder} is no folder; give one with the data's files inside.")
    if sorted(folder.glob("train-images*")):
        train = _idx(folder, "train-images"), _idx(folder, "train-labels")
        test = _idx(folder, "t10k-images"), _idx(folder, "t10k-labels")
    elif sorted(folder.glob("data_batch_*")):
        train = _cifar(sorted(folder.glob("data_batch_*")))
        test = _cifar([folder / "test_batch"])
    elif sorted(folder.glob("*.npz")):
        with np.load(sorted(folder.glob("*.npz"))[0]) as arrays:
            held = "test" if "test_images" in arrays else "heldout"
            train = arrays["train_images"], arrays["train_labels"]
            test = arrays[f"{held}_images"], arrays[f"{held}_labels"]
    else:
        raise SystemExit(f"--data {folder} holds no idx files, CIFAR-10 batches or .npz file.")
    return _dataset(train[0] / 255.0, train[1]), _dataset(test[0] / 255.0, test[1])


def _dataset(images: np.ndarray, labels: np.ndarray) -> TensorDataset:
    x = torch.tensor(images, dtype=torch.float32)
    x = x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2)
    return TensorDataset(x.contiguous(), torch.tensor(np.asarray(labels).reshape(-1)).long())


def _idx(folder: Path, stem: str) -> np.ndarray:
    path = sorted(folder.glob(f"{stem}*"))[0]
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    shape = [int.from_bytes(raw[4 * i : 4 * i + 4], "big") for i in range(1, raw[3] + 1)]
    return np.frombuffer(raw, np.uint8, offset=4 * (raw[3] + 1)).reshape(shape)


def _cifar(paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    batches = [pickle.loads(path.read_bytes(), encoding="bytes") for path in paths]
    images = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32)
    return images.transpose(0, 2, 3, 1), np.concatenate([batch[b"labels"] for batch in batches])

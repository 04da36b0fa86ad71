"""Whole results inside of .npz files, beside the arrays that are documented, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lla_callbacks.report.plain import pack, unpack

_STRUCTURE = "result/structure"
_TENSORS = "result/tensors/"
_TUPLE = "__tuple__"
_ITEMS = "__items__"
_CLASS = "__class__"


def result_arrays(result: Any) -> dict[str, Any]:
    """Return a result as arrays without pickles: its structure as JSON, its tensors by dtype."""
    packed = pack(result)
    text = json.dumps(_to_json(packed["structure"]))
    arrays = {_STRUCTURE: np.frombuffer(text.encode(), dtype=np.uint8)}
    tensors = packed["tensors"].items()
    return arrays | {f"{_TENSORS}{kind}": tensor.numpy() for kind, tensor in tensors}


def load_result(path: str | Path, kind: type) -> Any:
    """Return the result that a file holds.

    Args:
        path: An .npz file that ``save`` wrote.
        kind: The class that it must be.

    Raises:
        ValueError: If the file holds something else.
    """
    wanted = kind.__name__
    with np.load(path, allow_pickle=False) as stored:
        if _STRUCTURE not in stored.files:
            raise ValueError(
                f"{path} holds no {wanted} that can be read back; give a file that its save wrote."
            )
        structure = _from_json(json.loads(stored[_STRUCTURE].tobytes().decode()))
        tensors = {
            name.removeprefix(_TENSORS): torch.from_numpy(stored[name])
            for name in stored.files
            if name.startswith(_TENSORS)
        }
    name = structure.get(_CLASS, "").rpartition(":")[2] if isinstance(structure, Mapping) else ""
    if name != wanted:
        raise ValueError(f"{path} holds a {name or 'list'}; give one with a {wanted}.")
    return unpack({"structure": structure, "tensors": tensors})


def _to_json(plain: Any) -> Any:
    """Return a plain form with nothing that JSON would not give back as it was."""
    if isinstance(plain, Mapping):
        if all(type(key) is str for key in plain):
            return {key: _to_json(item) for key, item in plain.items()}
        return {_ITEMS: [[_to_json(key), _to_json(item)] for key, item in plain.items()]}
    if isinstance(plain, tuple):
        return {_TUPLE: [_to_json(item) for item in plain]}
    if isinstance(plain, list):
        return [_to_json(item) for item in plain]
    return plain


def _from_json(found: Any) -> Any:
    if isinstance(found, dict):
        if _TUPLE in found:
            return tuple(_from_json(item) for item in found[_TUPLE])
        if _ITEMS in found:
            return {_from_json(key): _from_json(item) for key, item in found[_ITEMS]}
        return {key: _from_json(item) for key, item in found.items()}
    if isinstance(found, list):
        return [_from_json(item) for item in found]
    return found

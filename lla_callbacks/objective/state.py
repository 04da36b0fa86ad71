"""Evaluate a module and leave no trace: everything a forward pass may change is restored."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from lla_callbacks.linalg.errors import MeasurementError
from lla_callbacks.linalg.space import local_part
from lla_callbacks.objective.gradient_hooks import no_gradient_hooks

_DROPPING = frozenset(
    kind.__name__
    for kind in (
        nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
        nn.FeatureAlphaDropout, nn.RNN, nn.GRU, nn.LSTM,
    )
)  # fmt: skip
_TORCH_KEYS = frozenset(nn.Module().__dict__)


@contextmanager
def preserved(module: nn.Module, *, seed: int | None, check_weights: bool = True) -> Iterator[None]:
    """Restore the module and every random stream on leaving, whatever happened inside.

    Kept: random streams of python, numpy, torch's CPU and every initialised CUDA device
    (inside, all start from ``seed``, or with ``None`` from where they stand, so that two
    passes agree); buffers (clones are swapped
    in, so that the originals keep value, identity and version) and frozen parameters
    likewise; plain attributes of every submodule, where torchmetrics keep their state and
    users their counters and lists; gradients (parked) and hooks on them (not called);
    ``requires_grad``; train and eval modes; the gradient mode.

    Not kept, since they cannot be seen: objects of the user's own classes, files, globals.

    Args:
        module: The module.
        seed: Where random streams start inside.
        check_weights: Whether trainable weights are kept and checked too; without it, a
            caller that moves them puts them back, and saves a copy.

    Raises:
        MeasurementError: If the trainable weights were changed inside. They are restored,
            but what was computed is not a function of them.
    """
    with ExitStack() as stack:
        stack.enter_context(preserved_random_streams(seed))
        stack.enter_context(_preserved_attributes(module))
        if check_weights:
            stack.enter_context(_unchanged_weights(module))
        stack.enter_context(_preserved_frozen_parameters(module))
        stack.enter_context(_preserved_buffers(module))
        stack.enter_context(_preserved_gradients(module))
        stack.enter_context(no_gradient_hooks(module))
        stack.enter_context(preserved_modes(module))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


@contextmanager
def weights_at(module: nn.Module, snapshot: Snapshot | None) -> Iterator[None]:
    """Let a module have the weights and buffers of a snapshot; ``None`` changes nothing.

    Parameters stay the same objects (optimizers and wrappers hold them) and get their
    values, to the bit, back on leaving.
    """
    if snapshot is None:
        yield
        return
    present = take_snapshot(module)
    try:
        _put(module, snapshot)
        yield
    finally:
        _put(module, present)


@dataclass(frozen=True)
class Snapshot:
    """Values of a module's parameters and buffers at one moment, by name."""

    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]


def take_snapshot(module: nn.Module) -> Snapshot:
    """Return copies of the parameters and the buffers."""
    return Snapshot(
        {n: p.detach().clone() for n, p in module.named_parameters()},
        {n: b.detach().clone() for n, b in module.named_buffers()},
    )


def _put(module: nn.Module, snapshot: Snapshot) -> None:
    with torch.inference_mode(False), torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in snapshot.parameters:
                # .data: a graph that the user still holds does not see a new version.
                parameter.data.copy_(snapshot.parameters[name])
        for name, buffer in module.named_buffers():
            if name in snapshot.buffers:
                buffer.data.copy_(snapshot.buffers[name])


@contextmanager
def preserved_modes(module: nn.Module) -> Iterator[None]:
    """Restore the train or eval mode of every submodule on leaving."""
    modes = [(m, m.training) for m in module.modules()]
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


def set_mode(
    module: nn.Module, mode: str, *, dropout: bool, training: Mapping[nn.Module, bool] | None
) -> None:
    """Put a module into a normalization mode, for use inside :func:`preserved`.

    Args:
        module: The module.
        mode: ``"batch"``: as in training, normalization by batch statistics. ``"eval"`` and
            ``"recalibrate"``: as in evaluation, normalization by running statistics.
        dropout: Whether dropout stays as the mode has it; otherwise it is off.
        training: How each submodule stands during training, where that is known (users
            freeze parts by ``.eval()``); by default ``module.train()`` decides.
    """
    if mode != "batch":
        for m in module.modules():
            m.training = False
        return
    if training is None:
        module.train()
    else:
        for m in module.modules():
            m.training = training.get(m, True)
    if not dropout:
        for m in module.modules():
            # A scripted module remembers by name what it was.
            scripted = getattr(m, "original_name", "")
            if isinstance(m, (_DropoutNd, nn.RNNBase)) or scripted in _DROPPING:
                m.training = False


@contextmanager
def preserved_random_streams(seed: int | None) -> Iterator[None]:
    """Restore every random stream on leaving; inside, all start from ``seed`` if there is one."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = _cuda_states()
    try:
        if seed is not None:
            seed_everything(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def seed_everything(seed: int) -> None:
    """Start every random stream anew, for use inside :func:`preserved_random_streams`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)


def _cuda_states() -> list[Tensor]:
    """Return the random states of the CUDA devices, none where CUDA was never used."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return []
    return torch.cuda.get_rng_state_all()


@contextmanager
def _preserved_attributes(module: nn.Module) -> Iterator[None]:
    memo = known_modules(module)
    saved: list[tuple[nn.Module, dict[str, Any]]] = []
    try:
        for m in module.modules():
            originals = {key: value for key, value in m.__dict__.items() if is_state(key)}
            saved.append((m, originals))
            # The copies go live, so that the originals come back untouched.
            for key, value in originals.items():
                m.__dict__[key] = copy_of(value, memo)
        yield
    finally:
        for m, originals in saved:
            for key in [key for key in m.__dict__ if is_state(key) and key not in originals]:
                del m.__dict__[key]
            m.__dict__.update(originals)


def is_state(key: str) -> bool:
    """Return whether an attribute of a module is the user's, not torch's own."""
    return key not in _TORCH_KEYS


def known_modules(module: nn.Module) -> dict[int, Any]:
    """Return a memo by which :func:`copy_of` leaves registered submodules what they are.

    A plain list of them is how many modules remember an order.
    """
    return {id(m): m for m in module.modules()}


def copy_of(value: Any, memo: dict[int, Any]) -> Any:
    """Copy tensors, arrays, generators and containers, keeping aliases; the rest stays itself."""
    if id(value) in memo:
        return memo[id(value)]
    copied = value
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        copied = value.detach().clone() if value.is_leaf else value
    elif isinstance(value, np.ndarray):
        copied = value.copy()
    elif isinstance(value, torch.Generator):
        copied = torch.Generator(device=value.device)
        copied.set_state(value.get_state())
    elif isinstance(value, (random.Random, np.random.Generator, np.random.RandomState)):
        copied = deepcopy(value)
    elif isinstance(value, (list, set, deque)):
        copied = copy(value)
        copied.clear()
        memo[id(value)] = copied
        for item in value:
            (copied.add if isinstance(copied, set) else copied.append)(_inner(item, memo))
    elif isinstance(value, dict):
        copied = copy(value)
        for key, item in value.items():
            dict.__setitem__(copied, key, _inner(item, memo))
    elif isinstance(value, tuple):
        items = [_inner(item, memo) for item in value]
        if any(new is not old for new, old in zip(items, value, strict=True)):
            copied = value._make(items) if hasattr(value, "_make") else type(value)(items)
    elif isinstance(value, SimpleNamespace):
        copied = SimpleNamespace(**copy_of(vars(value), memo))
    memo[id(value)] = copied
    return copied


def _inner(value: Any, memo: dict[int, Any]) -> Any:
    """Copy what lies inside a container: also modules, which no submodule list names."""
    if isinstance(value, nn.Module) and id(value) not in memo:
        memo[id(value)] = deepcopy(value)
    return copy_of(value, memo)


@contextmanager
def _unchanged_weights(module: nn.Module) -> Iterator[None]:
    """Restore trainable weights that were changed inside, and say so."""
    trained = [local_part(p) for p in module.parameters() if p.requires_grad]
    saved = [(p, p.detach().clone()) for p in trained]
    changed = False
    try:
        yield
    finally:
        for p, value in saved:
            if not torch.equal(_bits(p), _bits(value)):
                p.data.copy_(value)
                changed = True
    if changed:
        raise MeasurementError(
            "the loss changes the trainable weights while it is computed, so it has no Hessian.",
            "Give loss=callable(module, batch) that leaves them alone.",
        )


def _bits(tensor: Tensor) -> Tensor:
    """Return a tensor's bytes, so that NaN equals itself and -0.0 is not 0.0."""
    # One contiguous dimension: scalars and other memory formats cannot be viewed as bytes.
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


@contextmanager
def _preserved_frozen_parameters(module: nn.Module) -> Iterator[None]:
    """Swap clones in for parameters that are not trained, such as a target network's."""
    saved: list[tuple[nn.Module, str, nn.Parameter]] = []
    clones: dict[int, nn.Parameter] = {}
    try:
        for m in module.modules():
            for name, p in m._parameters.items():
                if p is not None and not p.requires_grad:
                    saved.append((m, name, p))
                    clone = nn.Parameter(p.detach().clone(), requires_grad=False)
                    m._parameters[name] = clones.setdefault(id(p), clone)
        yield
    finally:
        for m, name, p in saved:
            m._parameters[name] = p


@contextmanager
def _preserved_buffers(module: nn.Module) -> Iterator[None]:
    saved: list[tuple[nn.Module, dict[str, Tensor | None]]] = []
    clones: dict[int, Tensor] = {}
    try:
        for m in module.modules():
            saved.append((m, dict(m._buffers.items())))
            for name, buffer in m._buffers.items():
                if buffer is not None:
                    clone = clones.setdefault(id(buffer), buffer.detach().clone())
                    m._buffers[name] = clone
        yield
    finally:
        for m, buffers in saved:
            # Key by key: the buffers of a scripted module are no full dictionary.
            for name, _ in list(m._buffers.items()):
                if name not in buffers:
                    del m._buffers[name]
            for name, buffer in buffers.items():
                m._buffers[name] = buffer


@contextmanager
def _preserved_gradients(module: nn.Module) -> Iterator[None]:
    saved = [(p, p.grad, p.requires_grad) for p in module.parameters()]
    try:
        for p, _, _ in saved:
            p.grad = None
        yield
    finally:
        for p, gradient, requires_grad in saved:
            p.requires_grad_(requires_grad)
            p.grad = gradient

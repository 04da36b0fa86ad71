"""Evaluate a module and leave no trace: everything a forward pass may change is restored."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from lla_callbacks.linalg.errors import MeasurementError
from lla_callbacks.linalg.space import local_part
from lla_callbacks.objective.copies import Copier
from lla_callbacks.objective.gradient_hooks import hooks_of, no_gradient_hooks
from lla_callbacks.objective.interrupts import deliver, held_back, shielded
from lla_callbacks.objective.muting import no_logging
from lla_callbacks.objective.namespaces import Namespaces
from lla_callbacks.objective.precision import ORIGINAL
from lla_callbacks.objective.sharded import is_sharded
from lla_callbacks.objective.stand_ins import RefusedError
from lla_callbacks.objective.tensor_copies import restored_values, same_bits, separate

_DROPPING = frozenset(
    kind.__name__
    for kind in (
        nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
        nn.FeatureAlphaDropout, nn.RNN, nn.GRU, nn.LSTM,
    )
)  # fmt: skip


@contextmanager
def preserved(
    module: nn.Module,
    *,
    seed: int | None,
    check_weights: bool = True,
    widen: bool = False,
    loss: Any = None,
) -> Iterator[Copier]:
    """Restore the module and every random stream on leaving, whatever happened inside.

    Kept: random streams of python, numpy, torch's CPU and every initialised CUDA device (inside,
    all start from ``seed``, or with ``None`` from where they stand: two passes agree); buffers and
    frozen parameters (copies are swapped in, which take memory only once they are written, so
    that the originals keep value, identity and version); attributes of every submodule and of its
    class, globals and closures that their methods use, whatever they hold, each object copied
    once, so that references stay references; gradients (parked) and hooks on them (not called);
    ``requires_grad``; modes; the gradient mode. The Trainer is a shadow, whose loggers and
    ``self.log``, by any name, take all and do nothing.

    What cannot be copied (open files, generators, queues, loaders with workers) is replaced by
    a stand-in that refuses to be used. Not kept: what installed packages keep to themselves.
    SIGINT and SIGTERM wait while any of this is changed or put back.

    Args:
        module: The module.
        seed: Where random streams start inside.
        check_weights: Whether trainable weights are kept and checked too; without it, a
            caller that moves them puts them back, and saves a copy.
        widen: Whether half-precision attributes become float32, as the weights have.
        loss: What is called inside, whose globals are kept too.

    Yields:
        The copier for batches too: what they share with the module is to stay shared.

    Raises:
        MeasurementError: If the trainable weights were changed inside (they are restored, but
            what was computed is no function of them), or if a stand-in was used.
    """
    with held_back(), ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(preserved_random_streams(seed))
        copier = copier_for(module, widen=widen)
        stack.enter_context(_nothing_refused(copier))
        if check_weights:
            stack.enter_context(unchanged_weights(module))
        stack.enter_context(_preserved_frozen_parameters(module, copier))
        stack.enter_context(_preserved_buffers(module, copier))
        stack.enter_context(_preserved_attributes(module, copier, loss))
        stack.enter_context(_preserved_gradients(module, copier))
        stack.enter_context(no_gradient_hooks(module))
        stack.enter_context(no_logging(module))
        stack.enter_context(preserved_modes(module))
        stack.enter_context(torch.enable_grad())
        yield copier
    deliver()


def copier_for(
    module: nn.Module, *, widen: bool = False, refusals: list[RefusedError] | None = None
) -> Copier:
    """Return a copier that leaves a module's own parts what they are."""
    tensors = [*module.parameters(), *module.buffers()]
    known: list[tuple[Any, Any]] = [(m, m) for m in module.modules()]
    known += [(t, t) for t in tensors]
    pairs = [(t, t) for t in tensors]
    if widen:
        # References to what was widened lead to what it was widened to.
        wide = [(t.__dict__[ORIGINAL], t) for t in tensors if ORIGINAL in t.__dict__]
        known += wide
        pairs += wide
    copier = Copier(known, widen=widen, root=module, refusals=refusals)
    # By what stands for them once they are asked for: copies of buffers are not made yet.
    copier.storages_of(lambda memo: ((old, memo.get(id(old), new)) for old, new in pairs))
    return copier


@contextmanager
def _nothing_refused(copier: Copier) -> Iterator[None]:
    """Raise what a stand-in raised, also where the user's code caught it."""
    try:
        yield
    except RefusedError:
        raise
    except Exception as error:
        if copier.refusals:
            raise copier.refusals[0] from error
        raise
    if copier.refusals:
        raise copier.refusals[0]


@contextmanager
@shielded
def weights_at(module: nn.Module, snapshot: Snapshot | None) -> Iterator[None]:
    """Let a module have the weights and buffers of a snapshot; ``None`` changes nothing.

    Parameters stay the same objects (optimizers and wrappers hold them) and get their
    values, to the bit, back on leaving.
    """
    if snapshot is None:
        yield
        return
    with held_back():
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
@shielded
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
        _train(module)
    else:
        for m in module.modules():
            m.training = training.get(m, True)
    if not dropout:
        for m in module.modules():
            # A scripted module remembers by name what it was.
            scripted = getattr(m, "original_name", "")
            if isinstance(m, (_DropoutNd, nn.RNNBase)) or scripted in _DROPPING:
                m.training = False


def _train(module: nn.Module) -> None:
    """Put a module in train mode, but for parts that refuse to be (exported programs)."""
    try:
        module.train()
    except NotImplementedError:
        if type(module).train is nn.Module.train and "train" not in module.__dict__:
            module.training = True
            for child in module.children():
                _train(child)


@contextmanager
@shielded
def preserved_random_streams(seed: int | None) -> Iterator[None]:
    """Restore every random stream on leaving; inside, all start from ``seed`` if there is one.

    The default dtype, as global as these, is put back too.
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = _cuda_states()
    dtype = torch.get_default_dtype()
    try:
        if seed is not None:
            seed_everything(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        torch.set_default_dtype(dtype)
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
@shielded
def _preserved_attributes(module: nn.Module, copier: Copier, loss: Any) -> Iterator[None]:
    namespaces = Namespaces(module, loss)
    try:
        # The copies go live, so that the originals come back untouched.
        namespaces.put_copies(copier)
        yield
    finally:
        namespaces.restore()


@contextmanager
@shielded
def unchanged_weights(module: nn.Module) -> Iterator[None]:
    """Restore trainable weights that were changed inside, and raise a MeasurementError."""
    trained = [local_part(p) for p in module.parameters() if p.requires_grad]
    saved = [(p, p.detach().clone()) for p in trained]
    changed = False
    try:
        yield
    finally:
        for p, value in saved:
            if not same_bits(p, value):
                p.data.copy_(value)
                changed = True
    if changed:
        raise MeasurementError(
            "the loss changes the trainable weights while it is computed, so it has no Hessian.",
            "Give loss=callable(module, batch) that leaves them alone.",
        )


@contextmanager
@shielded
def _preserved_frozen_parameters(module: nn.Module, copier: Copier) -> Iterator[None]:
    """Put copies in the places of parameters that are not trained, such as a target network's.

    Those of a class of their own (quantized weights) stay what they are, as nothing else knows
    how to make one; what they hold is put back if it was written.
    """
    stores: list[tuple[nn.Module, Any]] = []
    entries: list[tuple[Any, str, nn.Parameter]] = []
    in_place = is_sharded(module)
    special: dict[int, nn.Parameter] = {}
    try:
        for m in module.modules():
            store: Any = m._parameters
            if type(store) is dict and not in_place:
                # Parameters that are registered meanwhile go with it.
                stores.append((m, store))
                store = m.__dict__["_parameters"] = dict(store)
            for name, p in list(store.items()):
                if p is None or p.requires_grad:
                    continue
                if type(p) is not nn.Parameter or in_place:
                    special[id(p)] = p
                    continue
                if type(store) is not dict:
                    entries.append((store, name, p))
                if copier.memo.get(id(p), p) is p:
                    copied = nn.Parameter(separate(p), requires_grad=False)
                    copied.__dict__.update(p.__dict__)
                    _stand_for(p, copied, copier)
                store[name] = copier.memo[id(p)]
        with restored_values(special.values()):
            yield
    finally:
        for store, name, p in entries:
            store[name] = p
        for m, store in stores:
            m.__dict__["_parameters"] = store


@contextmanager
@shielded
def _preserved_buffers(module: nn.Module, copier: Copier) -> Iterator[None]:
    saved: list[tuple[nn.Module, Any, dict[str, Tensor | None]]] = []
    try:
        for m in module.modules():
            store: Any = m._buffers
            before = dict(store.items())
            saved.append((m, store, before))
            if type(store) is dict:
                store = m.__dict__["_buffers"] = dict(store)
            for name, buffer in before.items():
                if isinstance(buffer, Tensor):
                    if copier.memo.get(id(buffer), buffer) is buffer:
                        _stand_for(buffer, separate(buffer), copier)
                    store[name] = copier.memo[id(buffer)]
        yield
    finally:
        for m, store, buffers in saved:
            if type(store) is dict:
                m.__dict__["_buffers"] = store
                continue
            # Key by key: the buffers of a scripted module are no full dictionary.
            for name, _ in list(store.items()):
                if name not in buffers:
                    del store[name]
            for name, buffer in buffers.items():
                store[name] = buffer


def _stand_for(tensor: Tensor, copied: Tensor, copier: Copier) -> None:
    """Let references to a tensor, and to what it was widened from, lead to its copy."""
    copier.memo[id(tensor)] = copied
    if tensor.__dict__:
        original = tensor.__dict__.get(ORIGINAL)
        if original is not None:
            copier.memo[id(original)] = copied


@contextmanager
@shielded
def _preserved_gradients(module: nn.Module, copier: Copier) -> Iterator[None]:
    saved = [(p, p.grad, p.requires_grad, dict(p.__dict__)) for p in module.parameters()]
    restore_hooks = hooks_of(module)
    try:
        for p, _, _, attributes in saved:
            p.grad = None
            for key, value in attributes.items():
                if key != ORIGINAL:
                    p.__dict__[key] = copier.copy(value, ((None, "parameter"), f".{key}"))
        yield
    finally:
        restore_hooks()
        for p, gradient, requires_grad, attributes in saved:
            p.requires_grad_(requires_grad)
            p.grad = gradient
            if p.__dict__ or attributes:
                p.__dict__.clear()
                p.__dict__.update(attributes)

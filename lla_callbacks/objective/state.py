"""Evaluate a module and leave no trace: everything a forward pass may change is restored."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
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
from lla_callbacks.objective.gradient_hooks import no_gradient_hooks
from lla_callbacks.objective.interrupts import deliver, held_back, shielded
from lla_callbacks.objective.inventory import Inventory, inventory_of
from lla_callbacks.objective.muting import no_logging
from lla_callbacks.objective.namespaces import Namespaces
from lla_callbacks.objective.precision import ORIGINAL
from lla_callbacks.objective.stand_ins import RefusedError
from lla_callbacks.objective.swapped import (
    preserved_buffers,
    preserved_frozen_parameters,
    preserved_gradients,
)
from lla_callbacks.objective.tensor_copies import same_bits

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
    with preserved_each(
        module, seed=seed, check_weights=check_weights, widen=widen, loss=loss
    ) as begin:
        yield begin()


@contextmanager
def preserved_each(
    module: nn.Module,
    *,
    seed: int | None,
    check_weights: bool = True,
    widen: bool = False,
    loss: Any = None,
) -> Iterator[Callable[[], Copier]]:
    """Do as :func:`preserved` does for several evaluations, each of which is begun by a call.

    Each begins from the very state in which this was entered, as if the guard had been left and
    entered again: whatever it swaps is the original for a moment, and then a new copy of it. What
    there is to be kept is found out once.

    Args:
        module: See :func:`preserved`.
        seed: Likewise.
        check_weights: Likewise.
        widen: Likewise.
        loss: Likewise.

    Yields:
        What begins an evaluation, and returns its copier. Before the first, nothing is swapped.

    Raises:
        MeasurementError: See :func:`preserved`.
    """
    with (
        held_back(),
        torch.inference_mode(False),
        torch.enable_grad(),
        preserved_random_streams(seed) as restart,
        ExitStack() as stack,
    ):
        held = inventory_of(module)
        namespaces = Namespaces(held, loss)
        begun = False

        def begin() -> Copier:
            nonlocal begun
            stack.close()
            if begun:
                restart()
            begun = True
            copier = copier_for(held, widen=widen)
            stack.enter_context(_nothing_refused(copier))
            if check_weights:
                stack.enter_context(unchanged_weights(module))
            stack.enter_context(preserved_frozen_parameters(held, copier))
            stack.enter_context(preserved_buffers(held, copier))
            stack.enter_context(_preserved_attributes(namespaces, copier))
            stack.enter_context(preserved_gradients(held, copier))
            stack.enter_context(no_gradient_hooks(held))
            stack.enter_context(no_logging(held))
            stack.enter_context(preserved_modes(held))
            return copier

        yield begin
    deliver()


def copier_for(
    held: Inventory, *, widen: bool = False, refusals: list[RefusedError] | None = None
) -> Copier:
    """Return a copier that leaves a module's own parts what they are."""
    pairs: list[tuple[Any, Any]] = [(t, t) for t in (*held.parameters, *held.buffers)]
    if widen:
        # References to what was widened lead to what it was widened to.
        pairs += [(t.__dict__[ORIGINAL], t) for t, _ in pairs if ORIGINAL in t.__dict__]
    modules = [(m, m) for m in held.modules]
    copier = Copier([*modules, *pairs], widen=widen, root=held.root, refusals=refusals)
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
def preserved_modes(held: Inventory) -> Iterator[None]:
    """Restore the train or eval mode of every submodule on leaving."""
    modes = [(m, m.training) for m in held.modules]
    try:
        yield
    finally:
        for m, training in modes:
            # Asked first, since a module sets its attributes at length.
            if m.training != training:
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
def preserved_random_streams(seed: int | None) -> Iterator[Callable[[], None]]:
    """Restore every random stream on leaving; inside, all start from ``seed`` if there is one.

    The default dtype, as global as these, is put back too.

    Yields:
        What lets them start again, as at first.
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = _cuda_states()
    dtype = torch.get_default_dtype()

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        torch.set_default_dtype(dtype)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    def restart() -> None:
        if seed is None:
            restore()
        else:
            torch.set_default_dtype(dtype)
            seed_everything(seed)

    try:
        if seed is not None:
            seed_everything(seed)
        yield restart
    finally:
        restore()


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
def _preserved_attributes(namespaces: Namespaces, copier: Copier) -> Iterator[None]:
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

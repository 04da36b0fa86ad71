"""The loss that a penalty is of: that of the step's own batch, as a function of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lla_callbacks.callbacks.compat import MisconfigurationException, loss_scale
from lla_callbacks.callbacks.moments import is_unsized
from lla_callbacks.callbacks.replay import trainer_loss
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.objective.batches import fresh
from lla_callbacks.objective.checkpoints import no_checkpoints
from lla_callbacks.objective.copies import Copier
from lla_callbacks.objective.loss import Loss
from lla_callbacks.objective.objective import trainable
from lla_callbacks.objective.state import preserved_each
from lla_callbacks.penalty.displacement import DisplacedLoss
from lla_callbacks.penalty.elsewhere import Elsewhere
from lla_callbacks.penalty.middle import penalized_parameters


class Penalized:
    """Which parameters are penalized, found out once for the parameters that are trained.

    Args:
        owner: What messages begin with.
        layers: As the user gave them.

    Attributes:
        place: Where they stand meanwhile.
        space: Those that are trained, as of the last :meth:`look`.
    """

    def __init__(self, owner: str, layers: Any) -> None:
        self._owner = owner
        self._layers = layers
        self._outline: list[Any] | None = None
        self._named: tuple[str, ...] = ()
        self._names: list[str] = []
        self.place = Elsewhere()
        self.space: ParameterSpace

    def look(self, module: nn.Module) -> bool:
        """Look which parameters are trained; ``False`` where lazy layers wait for their size.

        They are laid out anew only where something has changed, since this is asked at each step.
        """
        outline = _outline(module)
        if outline != self._outline:
            self._outline = None
            if is_unsized(module):
                return False
            self.space = ParameterSpace(trainable(module))
            self._outline = outline
        return True

    def names(self, module: Any, evaluate: Callable[[], Tensor]) -> list[str]:
        """Return them; anew where others have become trainable."""
        if self._named != self.space.names:

            def run() -> None:
                # With a graph, since a step may differentiate on its own way.
                evaluate()

            try:
                self._names = penalized_parameters(module, self.space, self._layers, run)
            except ValueError as error:
                raise MisconfigurationException(f"{self._owner}: {error}") from error
            self._named = self.space.names
        return self._names


class BatchLoss:
    """The loss of a batch at the weights as they stand: a function of nothing, with its graph.

    Args:
        trainer: The Trainer.
        module: The module.
        batch: The batch, and which of its epoch it is.
        loss: The user's own; ``None`` replays ``training_step``.
        as_trained: Whether the Trainer's precision is kept.
    """

    def __init__(
        self, trainer: Any, module: Any, batch: tuple[Any, int], loss: Loss | None, *,
        as_trained: bool,
    ) -> None:  # fmt: skip
        self._inner = trainer_loss(trainer, loss, batch_idx=batch[1], as_trained=as_trained)
        self._module = module
        self._batch = batch[0]
        self._begin: Callable[[], Copier] | None = None

    def __call__(self) -> Tensor:
        """Return it; the module is as it was, at once or after :meth:`together`."""
        if self._begin is None:
            with self._guard() as begin:
                return self._evaluate(begin)
        return self._evaluate(self._begin)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Guard several evaluations and their backward passes at once, which is cheaper.

        Each begins from the state in which this was entered. Whatever is entered inside is to be
        left inside.
        """
        with self._guard() as begin:
            self._begin = begin
            try:
                yield
            finally:
                self._begin = None

    def _guard(self) -> AbstractContextManager[Callable[[], Copier]]:
        # From where random streams stand: the dropout mask of the step that follows.
        # The weights are put back by who moves them.
        return preserved_each(self._module, seed=None, check_weights=False, loss=self._inner)

    def _evaluate(self, begin: Callable[[], Copier]) -> Tensor:
        gradients = torch.is_grad_enabled()
        batch = fresh(self._batch, self._module.device, copier=begin())
        # Reentrant checkpoints would hide the parameters from torch.autograd.grad.
        with torch.set_grad_enabled(gradients), no_checkpoints(reentrant_only=True):
            return self._inner(self._module, batch)


def loss_around(
    trainer: Any,
    module: Any,
    batch: tuple[Any, int],
    loss: Loss | None,
    penalized: Penalized,
    *,
    seed: int,
    step: int,
    relative: bool,
    autocast: bool,
) -> DisplacedLoss:
    """Return the loss of a batch at weights around the present ones.

    Args:
        trainer: The Trainer.
        module: The module.
        batch: The batch, and which of its epoch it is.
        loss: The user's own; ``None`` replays ``training_step``.
        penalized: Which parameters are displaced.
        seed: Of the probes, together with the step.
        step: The optimizer step.
        relative: Whether displacements are in units of each tensor's size.
        autocast: Whether the Trainer's precision is kept.
    """
    evaluate = BatchLoss(trainer, module, batch, loss, as_trained=autocast)
    # A manual step may have frozen some of them meanwhile.
    penalized.look(module)
    return DisplacedLoss(
        evaluate,
        penalized.space,
        penalized.names(module, evaluate),
        seed=seed,
        key=(step,),
        relative=relative,
        loss_scale=loss_scale(trainer) if autocast else 1.0,
        place=penalized.place,
        together=evaluate.together,
    )


def _outline(module: nn.Module) -> list[Any]:
    """Return all that the layout of the trained parameters depends on, to be compared."""
    found: list[Any] = []
    waiting = [module]
    seen = {id(module)}
    while waiting:
        m = waiting.pop()
        for name, p in m._parameters.items():
            if p is not None:
                shape = None if is_lazy(p) else p.shape
                found += (name, id(p), p.requires_grad, p.dtype, p.device, shape)
        for name, child in m._modules.items():
            found.append(name)
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                waiting.append(child)
    return found

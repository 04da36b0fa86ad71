"""Evaluate a module many times in a row, each time from the same state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lla_callbacks.objective.copies import Copier
from lla_callbacks.objective.inventory import inventory_of
from lla_callbacks.objective.namespaces import Namespaces
from lla_callbacks.objective.precision import ORIGINAL
from lla_callbacks.objective.sharded import resharded
from lla_callbacks.objective.state import copier_for, preserved, seed_everything, set_mode
from lla_callbacks.objective.tensor_copies import differ, plain_parts, separate
from lla_callbacks.objective.watching import Unchanged

# Evaluations that changed attributes, after which no more is hoped for.
MOST_CHANGES = 3
# Evaluations after which all tensors are compared, one more than the first.
LOOKS = 3


@contextmanager
def repeatable(
    module: nn.Module,
    *,
    seed: int,
    mode: str,
    dropout: bool,
    training: Mapping[nn.Module, bool] | None,
    check_weights: bool = True,
    widen: bool = False,
    loss: Any = None,
) -> Iterator[Repetition]:
    """Within this context a module can be evaluated many times; yields what resets it.

    The guard of :func:`~lla_callbacks.objective.state.preserved` is entered once for all
    evaluations.

    Args:
        module: The module.
        seed: Where the random streams start at each evaluation.
        mode: Normalization mode; see :func:`~lla_callbacks.objective.state.set_mode`.
        dropout: Whether dropout stays on.
        training: How each submodule stands during training, where that is known.
        check_weights: See :func:`~lla_callbacks.objective.state.preserved`.
        widen: Likewise.
        loss: Likewise.
    """
    with (
        resharded(module) as forget_gathered,
        preserved(module, seed=seed, check_weights=check_weights, widen=widen, loss=loss) as outer,
    ):
        set_mode(module, mode, dropout=dropout, training=training)
        keep_processes_apart(module)
        yield Repetition(module, seed, forget_gathered, outer, loss)


class Repetition:
    """Puts a module back into its starting state, before each evaluation.

    That is the random streams, buffers, frozen parameters, attributes and modes, so that every
    evaluation is of the same function. Attributes are copied anew, unless they can be seen to be
    what they were: a pass that wrote nothing leaves nothing to be put back.

    Args:
        module: The module, inside of its guard and in its mode.
        seed: Where the random streams start.
        forget_gathered: Lets parameters in shards be forgotten.
        outer: The guard's copier.
        loss: The user's own.

    Attributes:
        num_changed: How many evaluations changed attributes.
        drops_nothing: Whether all batches went through without functional dropout.
    """

    def __init__(
        self,
        module: nn.Module,
        seed: int,
        forget_gathered: Callable[[], None],
        outer: Copier,
        loss: Any,
    ) -> None:
        self._seed = seed
        self._dtype = torch.get_default_dtype()
        self._forget_gathered = forget_gathered
        held = inventory_of(module)
        self._attributes = Namespaces(held, loss)
        self._tensors = _Tensors(module)
        self._template = copier_for(held, refusals=outer.refusals)
        # A scripted module keeps its mode elsewhere, where no forward pass changes it.
        self._modes = [
            (m.__dict__, m.training) for m in module.modules() if "training" in m.__dict__
        ]
        # What it takes that an evaluation changed nothing, and how often it did.
        self._unchanged: Unchanged | None = None
        # What attributes were copied by, and nothing else yet.
        self._copier = self._template
        self.num_changed = 0
        self.drops_nothing = False

    def __call__(self, seed: int | None = None) -> Copier:
        """Reset, and return the copier by which batches are to be copied.

        Args:
            seed: Where the random streams start this time.
        """
        self._forget_gathered()
        torch.set_default_dtype(self._dtype)
        seed_everything(self._seed if seed is None else seed)
        if self._unchanged is not None:
            if self._unchanged():
                copier = self._copier.again()
                self._tensors.reset(copier)
                return copier
            self._unchanged = None
            self.num_changed += 1
        copier = self._template.again()
        self._attributes.put_copies(copier)
        self._tensors.reset(copier)
        for namespace, flag in self._modes:
            namespace["training"] = flag
        if self.num_changed < MOST_CHANGES:
            self._copier = copier.again()
        return copier

    def watch(self) -> None:
        """Let what the module is now be its starting state, as long as nothing changes it.

        For use right before an evaluation, after whatever else belongs to its start. A module
        that its evaluations keep changing is reset in full each time.
        """
        if self._unchanged is None and self.num_changed < MOST_CHANGES:
            plain = self._tensors.plain
            self._unchanged = self._attributes.watch() if plain else None
            if self._unchanged is None:
                self.num_changed = MOST_CHANGES

    @property
    def is_watched(self) -> bool:
        """Whether passes so far changed no attribute, and a change would be seen."""
        return self._unchanged is not None and self._unchanged()

    def settled(self, copier: Copier) -> bool:
        """Put back what a pass wrote into tensors; return whether it wrote nothing else.

        Containers of many entries are left to :attr:`is_watched`.

        Args:
            copier: What the pass was reset by.
        """
        if self._unchanged is None or not self._unchanged.short():
            return False
        self._tensors.reset(copier)
        return True


class _Tensors:
    """Buffers and frozen parameters of every submodule, put back by value.

    Tensors that were registered meanwhile go, and what any of them has as attributes is copied
    anew.
    """

    def __init__(self, module: nn.Module) -> None:
        self._places: list[tuple[dict[str, Any], str, Tensor]] = []
        self._stores: list[tuple[dict[str, Any], frozenset[str]]] = []
        # Every tensor, trained ones too, and what its attributes were.
        self._attributes: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
        # Parts of tensors of classes of their own.
        self._parts: list[tuple[Tensor, Tensor]] = []
        # Every tensor, and whether it took gradients; those of before are put aside by the guard.
        self._flags: list[tuple[Tensor, bool]] = []
        self._values: dict[int, tuple[Tensor, Tensor, int]] = {}
        # Looked at in whole for a few evaluations: what is written below autograd's sight, as
        # by .data, has no new version, and is put back each time from then on.
        self._looks = LOOKS
        self._unseen: set[int] = set()
        for m in module.modules():
            frozen = {k: p for k, p in m._parameters.items() if p is not None}
            for store, entries in ((m._buffers, m._buffers), (m._parameters, frozen)):
                if type(store) is dict:  # not those of scripted modules
                    self._stores.append((store, frozenset(store)))
                for name, tensor in entries.items():
                    if tensor is not None:
                        own = tensor.__dict__
                        self._attributes[id(tensor)] = (own, dict(own))
                        self._flags.append((tensor, tensor.requires_grad))
                    if tensor is None or tensor.requires_grad:
                        continue
                    self._places.append((store, name, tensor))
                    if id(tensor) in self._values:
                        continue
                    if type(tensor) in (Tensor, nn.Parameter):
                        self._values[id(tensor)] = (tensor, separate(tensor), tensor._version)
                    else:
                        self._parts += [(part, separate(part)) for part in plain_parts(tensor)]

    @property
    def plain(self) -> bool:
        """Whether no tensor has attributes of its own, which only copies keep apart."""
        return all(
            not attributes.keys() - {ORIGINAL} for _, attributes in self._attributes.values()
        )

    def reset(self, copier: Copier) -> None:
        """Put everything back."""
        for store, names in self._stores:
            if len(store) > len(names):
                for name in store.keys() - names:
                    del store[name]
        for store, name, tensor in self._places:
            store[name] = tensor
        for own, attributes in self._attributes.values():
            if not (own or attributes):
                continue
            for name in own.keys() - attributes.keys():
                del own[name]
            for name, attribute in attributes.items():
                if name != ORIGINAL:
                    own[name] = copier.copy(attribute, ((None, "parameter"), f".{name}"))
        for tensor, flag in self._flags:
            if tensor.requires_grad is not flag:
                tensor.requires_grad_(flag)
            if tensor.grad is not None:
                tensor.grad = None
        looks, self._looks = self._looks > 0, self._looks - 1
        with torch.no_grad():
            for part, value in self._parts:
                if differ(part, value):
                    part.copy_(value)
            for key, (tensor, value, version) in self._values.items():
                if tensor._version != version:
                    tensor.copy_(value)
                    self._values[key] = (tensor, value, tensor._version)
                elif key in self._unseen:
                    tensor.data.copy_(value)
                elif looks and differ(tensor, value):
                    self._unseen.add(key)
                    tensor.data.copy_(value)


def keep_processes_apart(module: nn.Module) -> None:
    """Let synchronised batch norm use its own process's statistics.

    Processes that share the points of a slice evaluate different weights, whose statistics
    must not be mixed. The instance attribute goes with the guard.
    """
    for m in module.modules():
        if isinstance(m, nn.SyncBatchNorm):
            m.__dict__["forward"] = _BatchNorm.forward.__get__(m)
        # A metric that synchronises would wait for processes at other weights.
        for switch in ("sync_on_compute", "_to_sync"):
            if isinstance(m.__dict__.get(switch), bool):
                m.__dict__[switch] = False

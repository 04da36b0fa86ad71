"""Whatever is random in a forward pass: what is dropout by another name, and what is the model."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from lla_callbacks.objective.function_modes import FunctionMode

# Of the well-known libraries: timm, torchvision, transformers, monai, mmcv, keras' and their like.
_NAMES = re.compile(r"(DropPath|StochasticDepth|DropBlock|DropConnect|LayerDrop|Dropout)(\d[dD])?$")
# Probabilities by which layers of transformers skip themselves in training.
_SWITCHES = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
# Distances from the golden ratio's multiples: seeds of neighbouring batches have nothing in common.
_STRIDE = 0x9E3779B97F4A7C15
_MOST = 2**63
# The name of the module itself, whose own forward pass is none of its submodules'.
ROOT = "."
RANDOM_NOTE = (
    "the loss is random (noise is part of the model): each held batch has its own noise, which is "
    "held, so that this is of one draw"
)
# Functions whose draws are masks: of bits, or uniform numbers to be compared with a probability.
_MASKS = frozenset(
    getattr(function, "__name__", "")
    for function in (
        torch.bernoulli, torch.Tensor.bernoulli, torch.Tensor.bernoulli_, torch.rand,
        torch.rand_like, torch.Tensor.uniform_, nn.functional.rrelu,
    )
)  # fmt: skip
_DRAWS = _MASKS | {
    "randn", "randn_like", "normal", "normal_", "exponential_", "multinomial", "poisson",
    "cauchy_", "log_normal_", "geometric_", "randint", "randint_like", "randperm", "random_",
    "rand", "_sample_dirichlet", "_standard_gamma", "binomial",
}  # fmt: skip


def silencer(module: nn.Module, names: Sequence[str]) -> Callable[[], None]:
    """Return what turns off whatever drops at random, for use inside a guard that restores modes.

    Dropout and stochastic depth are known by the names of their classes, and layers of
    transformers that skip themselves by the names of their settings.

    Args:
        module: The module.
        names: Of submodules that were seen to drop, beside those.
    """
    silent: list[dict[str, Any]] = []
    switches: list[tuple[dict[str, Any], str]] = []
    for name, m in module.named_modules():
        known = any(_NAMES.search(kind.__name__) for kind in type(m).__mro__)
        if (known or (name or ROOT) in names) and "training" in m.__dict__:
            silent.append(m.__dict__)
        switches += [(m.__dict__, s) for s in _SWITCHES if isinstance(m.__dict__.get(s), float)]

    def silence() -> None:
        for namespace in silent:
            namespace["training"] = False
        for namespace, switch in switches:
            namespace[switch] = 0.0

    return silence


def stream(seed: int, place: int) -> int:
    """Return the seed of one held batch, so that no two batches have the same noise."""
    return (seed + place * _STRIDE) % _MOST if place else seed


class Draws:
    """Which submodules drew random numbers in a pass, and of what kind.

    Attributes:
        masks: Names of submodules all of whose draws were masks.
        other: Names of those that drew anything else; ``""`` is all that is outside of any
            forward pass.
    """

    def __init__(self) -> None:
        self.masks: set[str] = set()
        self.other: set[str] = set()

    @property
    def any(self) -> bool:
        """Whether there were any."""
        return bool(self.masks | self.other)


def draws_of(
    ready: Callable[[], AbstractContextManager[Callable[[], object]]], module: nn.Module
) -> Draws:
    """Return what a pass draws.

    Args:
        ready: Returns a context that yields the pass.
        module: Whose submodules are told apart.
    """
    for last, gradients in enumerate((False, True)):
        try:
            with ready() as run, torch.set_grad_enabled(gradients), watching(module) as found:
                run()
        except RuntimeError as error:
            # "does not require grad": the loss has derivatives inside.
            if last or "require grad" not in str(error):
                raise
        else:
            return found
    raise AssertionError("the second try returns or raises")


@contextmanager
def watching(module: nn.Module) -> Iterator[Draws]:
    """Within this context, forward passes tell who draws random numbers."""
    found = Draws()
    stack: list[str] = [""]
    state = random_marks()
    kinds: list[str] = []

    def settle() -> None:
        """Book whatever was drawn since the last change of module."""
        nonlocal state
        now = random_marks()
        if now != state:
            mask = bool(kinds) and all(kind in _MASKS for kind in kinds)
            # Python's and numpy's numbers in [0, 1) are compared with a probability as a rule.
            mask = mask or (not kinds and now[0] == state[0])
            (found.masks if mask else found.other).add(stack[-1])
        state = now
        kinds.clear()

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            settle()
            stack.append(name)

        return hook

    def leave(*_: Any) -> None:
        settle()
        if len(stack) > 1:
            stack.pop()

    handles = []
    for name, m in module.named_modules():
        if isinstance(m, torch.jit.ScriptModule):
            # It takes no such hooks, and is one operation.
            continue
        handles.append(m.register_forward_pre_hook(enter(name or ROOT)))
        handles.append(m.register_forward_hook(leave, always_call=True))
    try:
        with _Kinds(kinds):
            yield found
        settle()
    finally:
        for handle in handles:
            handle.remove()
        found.masks -= found.other


class _Kinds(FunctionMode):
    """Notes the names of functions that draw."""

    def __init__(self, kinds: list[str]) -> None:
        super().__init__()
        self._kinds = kinds

    def called(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return what a call returns."""
        name = getattr(func, "__name__", "")
        if name in _DRAWS:
            self._kinds.append(name)
        return func(*args, **kwargs)


def random_marks() -> tuple[Any, ...]:
    """Return marks of all random streams: torch's, then those of python and numpy."""
    torch_state: tuple[Any, ...] = (hash(torch.get_rng_state().numpy().tobytes()),)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch_state += tuple(hash(s.numpy().tobytes()) for s in torch.cuda.get_rng_state_all())
    numpy: Any = np.random.get_state()
    return torch_state, hash(random.getstate()), (hash(numpy[1].tobytes()), numpy[2])

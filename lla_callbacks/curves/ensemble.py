"""Several networks of one architecture that answer as one, and how much they differ."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.func import functional_call

Combine = Literal["probabilities", "binary", "outputs"]
# Weights of all members that are kept on the device of the inputs; more are brought one by one.
RESIDENT_BYTES = 2**30
# Below this share of predictions that differ, an ensemble of digits was one network
# (docs/benchmarks/connectivity.md).
ALIKE = 0.002


def cyclic_rate(i: int, cycle: int, highest: float, lowest: float) -> float:
    """Return the learning rate of step ``i`` of fast geometric ensembling.

    Garipov et al. 2018, section 4: ``t(i) = (mod(i - 1, c) + 1) / c``; linear from the highest
    rate (before the cycle's first step) to the lowest, which the step ``c / 2`` has, and back to
    the highest at the step ``c``.

    Args:
        i: Optimizer steps from 1.
        cycle: ``c``, even.
        highest: ``alpha_1``.
        lowest: ``alpha_2``.
    """
    t = ((i - 1) % cycle + 1) / cycle
    if t <= 0.5:
        return (1 - 2 * t) * highest + 2 * t * lowest
    return (2 - 2 * t) * lowest + (2 * t - 1) * highest


def ensemble_of(
    module: nn.Module,
    members: Sequence[Mapping[str, Tensor]],
    *,
    combine: Combine | Callable[[list[Any]], Any] = "probabilities",
    dim: int = 1,
    part: str = "",
) -> nn.Module:
    """Return a copy of a module that answers with the ensemble's output.

    It has the module's class and methods: a user's own ``test_step``, which calls ``self(x)``,
    and ``trainer.test`` work on it as they are. Every member computes in evaluation mode with its
    own buffers.

    Args:
        module: Of the members' architecture; it stays as it was.
        members: State dicts.
        combine: ``"probabilities"``: ``log(mean_k softmax(z_k))``, which is a valid vector of
            logits: cross entropy, argmax and torchmetrics take it for one. ``"binary"``: the
            logit of the mean of ``sigmoid(z_k)``. ``"outputs"``: the mean of the outputs, for
            regression. Or a function from the list of outputs to one output.
        dim: Of classes, for ``"probabilities"``.
        part: Path of the submodule whose output is combined, where steps call that and not the
            module itself, such as ``"net"``.

    Raises:
        ValueError: If there is no member, or a setting is not allowed.
    """
    if not members:
        raise ValueError("there is no member yet: the first comes half a cycle after the start.")
    if not callable(combine) and combine not in get_args(Combine):
        raise ValueError(
            f"combine is {combine!r}; give one of {', '.join(get_args(Combine))}, or a function "
            "of the list of outputs."
        )
    shell = copy.deepcopy(module).eval()
    place = _submodule(shell, part)
    inner = copy.deepcopy(place)
    prefix = f"{part}." if part else ""
    states = [
        {n.removeprefix(prefix): t for n, t in member.items() if n.startswith(prefix)}
        for member in members
    ]
    # Instead of the class's own: modules honour an attribute of the instance.
    forward = _Forward(inner, states, combine, dim)
    place.__dict__["forward"] = forward
    if not part:
        for hook in ("on_validation_epoch_end", "on_test_epoch_end", "on_predict_epoch_end"):
            if callable(getattr(shell, hook, None)):
                shell.__dict__[hook] = _Checked(forward, getattr(shell, hook))
    return shell


def _submodule(module: nn.Module, part: str) -> nn.Module:
    try:
        return module.get_submodule(part)
    except AttributeError as error:
        known = ", ".join(name for name, _ in module.named_children())
        raise ValueError(f"part is {part!r}, which is no submodule; there are: {known}.") from error


class _Forward:
    """The forward pass of all members, combined."""

    def __init__(
        self,
        inner: nn.Module,
        states: list[dict[str, Tensor]],
        combine: Combine | Callable[[list[Any]], Any],
        dim: int,
    ) -> None:
        self.inner = inner.eval()
        self.states = states
        self.combine = combine
        self.dim = dim
        self.calls = 0
        self._device = torch.device("cpu")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        device = _device_of((args, kwargs)) or self._device
        outputs = [
            functional_call(self.inner.to(device), state, args, kwargs)
            for state in self._on(device)
        ]
        if self.combine == "probabilities":
            return mean_log_probability(outputs, self.dim)
        if self.combine == "binary":
            return mean_logit(outputs)
        if self.combine == "outputs":
            return _mean(outputs)
        assert callable(self.combine)
        return self.combine(outputs)

    def _on(self, device: torch.device) -> Any:
        """Yield the members' states on a device; they stay there if they are not large."""
        size = sum(t.numel() * t.element_size() for state in self.states for t in state.values())
        if size <= RESIDENT_BYTES and device != self._device:
            self.states = [{n: t.to(device) for n, t in state.items()} for state in self.states]
            self._device = device
        for state in self.states:
            # Buffers that a forward pass may change are copies.
            yield {n: t.to(device, copy=not t.is_floating_point()) for n, t in state.items()}


class _Checked:
    """A hook that says if the ensemble was never asked."""

    def __init__(self, forward: _Forward, hook: Callable[[], Any]) -> None:
        self.forward, self.hook = forward, hook

    def __call__(self) -> Any:
        if not self.forward.calls:
            warnings.warn(
                "the steps never called the module itself, so that these results are of one "
                "network, not of the ensemble: give ensemble(module, part=...) the submodule that "
                "they call, or let them call self(x).",
                stacklevel=2,
            )
        return self.hook()


def mean_log_probability(logits: Sequence[Any], dim: int = 1) -> Tensor:
    """Return ``log(mean_k softmax(z_k))``, stable for logits of any size.

    Raises:
        ValueError: If outputs are no logits of two classes or more.
    """
    z = _tensors(logits)
    d = dim if z[0].ndim > 1 else -1
    if z[0].shape[d] < 2:
        raise ValueError(
            f"outputs have shape {tuple(z[0].shape)}, with one class along dim {d}: give "
            "combine='binary' for logits of two classes, 'outputs' for regression, or dim=."
        )
    if bool((z[0] >= 0).all()) and bool(((z[0].sum(d) - 1).abs() < 1e-3).all()):
        raise ValueError(
            "outputs are probabilities, not logits: give combine='outputs', which averages them."
        )
    stacked = torch.stack([torch.log_softmax(x, d) for x in z])
    return torch.logsumexp(stacked, 0) - math.log(len(z))


def mean_logit(logits: Sequence[Any]) -> Tensor:
    """Return the logit of the mean of ``sigmoid(z_k)``, stable for logits of any size."""
    z = torch.stack(_tensors(logits))
    yes = torch.logsumexp(torch.nn.functional.logsigmoid(z), 0)
    no = torch.logsumexp(torch.nn.functional.logsigmoid(-z), 0)
    return yes - no


def _tensors(outputs: Sequence[Any]) -> list[Tensor]:
    if not all(isinstance(z, Tensor) for z in outputs):
        raise ValueError(
            f"the module returns {type(outputs[0]).__name__}, not a tensor: give combine=callable "
            "that takes the list of the members' outputs, or part= of what returns logits."
        )
    return list(outputs)


def _mean(outputs: Sequence[Any]) -> Any:
    """Return the mean of outputs of any structure."""
    position = iter(range(10**9))
    every: list[list[Tensor]] = []
    for output in outputs:
        tensors: list[Tensor] = []
        apply_to_collection(output, Tensor, tensors.append)
        every.append(tensors)

    def average(tensor: Tensor) -> Tensor:
        k = next(position)
        return torch.stack([tensors[k] for tensors in every]).mean(0)

    return apply_to_collection(outputs[0], Tensor, average)


def _device_of(inputs: Any) -> torch.device | None:
    found: list[torch.device] = []
    apply_to_collection(inputs, Tensor, lambda t: found.append(t.device))
    return found[0] if found else None


@dataclass(frozen=True)
class Agreement:
    """How members of an ensemble do, alone and together, on the same samples.

    Attributes:
        quality: Name (``"nll"`` and ``"error"`` of classes, ``"mse"`` else) to the mean of the
            members' and the ensemble's.
        disagreement: Of classes: the share of predictions that differ, in the mean over pairs.
            Else: the standard deviation between members over that of the targets.
    """

    quality: Mapping[str, tuple[float, float]]
    disagreement: float

    @property
    def alike(self) -> bool:
        """Whether the members are so alike that nothing can be gained."""
        return self.disagreement < ALIKE


def agreement(outputs: Sequence[Tensor], target: Tensor) -> Agreement:
    """Return how alike members are.

    Args:
        outputs: Of each member, on all samples: logits ``(n, classes)``, or values.
        target: Classes ``(n,)``, whole numbers, or values.
    """
    z = torch.stack([x.double() for x in outputs])
    k = len(z)
    if not target.is_floating_point() and z.ndim == 3:
        log_p = torch.log_softmax(z, -1)
        mean = torch.logsumexp(log_p, 0) - math.log(k)
        classes = z.argmax(-1)
        pairs = [
            float((classes[i] != classes[j]).double().mean())
            for i in range(k)
            for j in range(i + 1, k)
        ]
        nll = -log_p.gather(-1, target.expand(k, -1)[..., None]).mean()
        wrong = (classes != target).double().mean()
        return Agreement(
            {
                "nll": (float(nll), float(-mean.gather(-1, target[:, None]).mean())),
                "error": (float(wrong), float((mean.argmax(-1) != target).double().mean())),
            },
            sum(pairs) / len(pairs) if pairs else math.nan,
        )
    y = target.double().reshape(z[0].shape)
    spread = float(z.var(0, unbiased=True).mean().sqrt()) if k > 1 else math.nan
    size = float(y.std()) or 1.0
    return Agreement(
        {"mse": (float((z - y).square().mean()), float((z.mean(0) - y).square().mean()))},
        spread / size,
    )

"""Whether a batch is the mean of its parts, which is verified before it goes through in parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lla_callbacks.linalg.accumulation import norm
from lla_callbacks.linalg.difference import first_derivative
from lla_callbacks.linalg.errors import (
    MeasurementError,
    NonFiniteError,
    described,
    is_out_of_memory,
)
from lla_callbacks.linalg.space import ParameterSpace

# Rounding differs between the two sums; a coupling of samples differs by far more.
LOSS_RTOL, GRADIENT_RTOL = 1e-4, 1e-3

_REMEDY = "Leave out microbatch_size, or use mode='eval' where batch statistics are the cause."

Context = Callable[[], AbstractContextManager[None]]


def check_split(
    evaluate: Callable[..., Any],
    module: nn.Module,
    whole: Any,
    parts: Sequence[Any],
    context: Context | None,
    counts: Sequence[int],
    *,
    name: str = "a batch",
) -> None:
    """Raise unless the parts of a batch add up to it, in the loss and its gradient.

    Each batch is asked: a mean over tokens, say, is one over samples as long as no sample is
    padded.

    Args:
        evaluate: The loss of a batch; with ``use=``, what that makes of it.
        module: Its trainable parameters are the variables.
        whole: The batch.
        parts: What it would be split into.
        context: Entered around the gradients; ``None`` compares the loss alone.
        counts: Samples in each part.
        name: What the batch is called.

    Raises:
        MeasurementError: Naming the batch.
    """
    if len(parts) < 2:
        return
    shares = [count / sum(counts) for count in counts]
    expected = value_of(evaluate, whole)
    try:
        found = sum(value_of(evaluate, p) * share for p, share in zip(parts, shares, strict=True))
    except NonFiniteError as error:
        raise MeasurementError(
            f"a part of {name} has no finite loss, and the whole has: the loss is no mean over "
            "samples (a mean over what is not padded or ignored, of which a part has nothing).",
            _REMEDY,
        ) from error
    except MeasurementError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # Batch statistics of one sample, say: the whole was evaluated.
        raise MeasurementError(
            f"a part of {name} fails, and the whole does not ({described(error)}).", _REMEDY
        ) from error
    apart = abs(found - expected) > LOSS_RTOL * max(abs(expected), 1e-6)
    if not apart and context is not None:
        apart = _gradients_differ(evaluate, module, whole, parts, shares, context)
    if apart:
        raise MeasurementError(
            f"microbatches change the loss of {name} (from {expected:.6g} to {found:.6g}) or its "
            "gradient: the samples of a batch see each other (batch statistics, a contrastive "
            "loss) or the loss is not a mean over samples (a mean over tokens, with padding).",
            _REMEDY,
        )


def value_of(evaluate: Callable[..., Any], batch: Any) -> float:
    """Return the loss of a batch, by a pass without a graph where the step does without one."""
    with torch.inference_mode(False):
        try:
            with torch.no_grad():
                return float(evaluate(batch))
        except RuntimeError as error:
            if "require grad" not in str(error):
                raise
        with torch.enable_grad():
            return float(evaluate(batch).detach())


def _gradients_differ(
    evaluate: Callable[..., Any],
    module: nn.Module,
    whole: Any,
    parts: Sequence[Any],
    shares: Sequence[float],
    context: Context,
) -> bool:
    """Return whether the parts' gradients add up to another one than the whole's.

    No, where memory does not suffice for the whole's.
    """
    space = ParameterSpace({n: p for n, p in module.named_parameters() if p.requires_grad})

    def gradient(batch: Any) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            found: Tensor = evaluate(
                batch,
                context=context,
                use=lambda loss: space.flatten(first_derivative(loss, space.tensors)),
            )
            return found

    try:
        expected = gradient(whole)
        found = torch.zeros_like(expected)
        for part, share in zip(parts, shares, strict=True):
            found += share * gradient(part)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    return norm(found - expected) > GRADIENT_RTOL * norm(expected)

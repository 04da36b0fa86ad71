"""What can go wrong while curvature is measured, each with its remedy."""

from __future__ import annotations

from typing import TypeVar

import torch

Error = TypeVar("Error", bound=Exception)


def forgetful(error: Error) -> Error:
    """Return an error without tracebacks and causes, so that keeping it keeps nothing alive."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def described(error: BaseException | None) -> str:
    """Return the kind and the text of an error, also of one whose text cannot be made."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - the error matters, not that of its text
        text = "(its text cannot be made)"
    return f"{type(error).__name__}: {text}"


class MeasurementError(RuntimeError):
    """A measurement that could not be completed.

    Args:
        message: What happened, naming what was seen.
        remedy: What the user can do about it, in one sentence.

    Attributes:
        message: What happened.
        remedy: What to do, for callers that show it apart.
    """

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(f"{message} {remedy}".strip())
        self.message = message
        self.remedy = remedy


class NotYetError(ValueError):
    """Something that a run has not got so far, and will have later."""


class NonFiniteError(MeasurementError):
    """A loss, a gradient or a Hessian-vector product is NaN or infinite."""


class NoSecondDerivativeError(MeasurementError):
    """An operation of the model cannot be differentiated twice."""


class OutOfMemoryError(MeasurementError):
    """A measurement needs more memory than there is, however small its pieces."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that an allocation failed, on whatever device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    signs = ("can't allocate memory", "out of memory", "not enough memory", "alloc_failed")
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)


def remedy_for(complaint: str) -> str:
    """Return what to do about an operation that autograd cannot differentiate twice."""
    for sign, remedy in _INSTEAD.items():
        if sign in complaint:
            return remedy
    return (
        "Give loss=callable(module, batch) that avoids it, or replace it by elementary operations."
    )


_CUSTOM = (
    "Give loss=callable(module, batch) that avoids it, or let its backward pass compute with "
    "operations that autograd follows, until torch.autograd.gradgradcheck is content."
)
# What autograd's complaint holds, and what to do.
_INSTEAD = {
    "embedding_bag": "Use nn.Embedding and add up its vectors, which has a second derivative.",
    "cdist": "Write the distances out, (x[:, None] - y[None]).square().sum(-1).sqrt().",
    "once_differentiable": _CUSTOM,
    "no graph for a double backward": _CUSTOM,
    "no autograd formula": _CUSTOM,
}

"""What every setting is checked by: each returns the value, or says what is allowed.

A message names the argument as the user gave it, what was given, what is allowed and what to do.
Numbers of numpy and of zero-dimensional tensors count as numbers; ``True`` does not.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from lla_callbacks.objective.training_step import SkippedBatchError

# More products, probes, points or rays than this are a slip of the hand: a measurement would not
# end within a day on the smallest network.
MOST_WORK = 10**6
# Points along one axis: a plane has the square of it.
MOST_POINTS = 10_001
# Numbers of samples, steps and bytes, and seeds, fit in 64 bits.
MOST = 2**63 - 1
# Of a text in a message.
_LONG = 120


def settle(settings: Any, **values: Any) -> None:
    """Give a frozen dataclass the values that its checks returned."""
    for name, value in values.items():
        object.__setattr__(settings, name, value)


def shown(value: Any) -> str:
    """Return a value as messages show it: short, and whatever its own ``repr`` does."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - the message matters, not the value's own trouble
        text = f"an object of type {type(value).__name__}"
    return text if len(text) <= _LONG else f"{text[: _LONG - 3]}..."


def whole(
    name: str, value: Any, least: int, most: int = MOST, *, none: bool = False, other: str = ""
) -> Any:
    """Return a whole number of at least ``least`` as an int.

    Args:
        name: The argument.
        value: What was given.
        least: The smallest that is allowed.
        most: The largest.
        none: Whether None is allowed, and returned.
        other: What else is allowed, in words: ``", or None for all"``.

    Raises:
        ValueError: If it is none.
    """
    if value is None and none:
        return None
    found = _number(value)
    if not isinstance(found, int) or found < least:
        raise ValueError(
            f"{name} is {shown(value)}; give a whole number of at least {least}{other}."
        )
    if found > most:
        bound = "2**63" if most == MOST else f"{most + 1:,}"
        raise ValueError(f"{name} is {shown(value)}; give a whole number below {bound}{other}.")
    return found


def none_or_two(name: str, value: Any) -> int:
    """Return 0, or a whole number of at least 2: one alone tells no spread."""
    found = _number(value)
    if not isinstance(found, int) or found < 0 or found == 1:
        raise ValueError(
            f"{name} is {shown(value)}; give a whole number of at least 2, or 0 for none."
        )
    checked: int = whole(name, found, 0, MOST_WORK)
    return checked


def even(name: str, value: Any, why: str) -> int:
    """Return an even whole number, 0 included."""
    found = _number(value)
    if not isinstance(found, int) or found < 0 or found % 2:
        raise ValueError(f"{name} is {shown(value)}; give an even number, {why}.")
    checked: int = whole(name, found, 0, MOST_WORK)
    return checked


def odd_points(name: str, value: Any, *, zero: bool = False) -> int:
    """Return a number of points with the centre among them: odd and at least 3."""
    found = _number(value)
    if zero and found == 0 and isinstance(found, int):
        return 0
    if not isinstance(found, int) or found < 3 or found % 2 == 0 or found > MOST_POINTS:
        raise ValueError(
            f"{name} is {shown(value)}; give an odd whole number from 3 to {MOST_POINTS:,}, so "
            f"that the centre is among the points{', or 0 for none' if zero else ''}."
        )
    return found


def number(
    name: str,
    value: Any,
    allowed: str,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
    none: bool = False,
) -> Any:
    """Return a finite number within bounds as a float.

    Args:
        name: The argument.
        value: What was given.
        allowed: What is allowed, in words: ``"a positive number"``.
        above: It is larger than this.
        least: It is at least this.
        below: It is smaller than this.
        most: It is at most this.
        none: Whether None is allowed, and returned.

    Raises:
        ValueError: If it is none.
    """
    if value is None and none:
        return None
    found = _number(value)
    inside = (
        found is not None
        and math.isfinite(found)
        and found > above
        and found >= least
        and found < below
        and found <= most
    )
    if not inside:
        raise ValueError(f"{name} is {shown(value)}; give {allowed}.")
    return float(found)  # type: ignore[arg-type]


def positive(name: str, value: Any, *, unit: str = "", none: bool = False) -> Any:
    """Return a positive finite number."""
    allowed = f"a positive number{unit}{', or None' if none else ''}"
    return number(name, value, allowed, above=0, none=none)


def fraction(name: str, value: Any, *, none: bool = False, other: str = "") -> Any:
    """Return a number between 0 and 1, neither included."""
    allowed = f"a number between 0 and 1{other or (', or None' if none else '')}"
    return number(name, value, allowed, above=0, below=1, none=none)


def seed_of(name: str, value: Any) -> int:
    """Return a seed: a whole number from 0 to below 2**63."""
    found: int = whole(name, value, 0)
    return found


def flag(name: str, value: Any, *, none: bool = False) -> Any:
    """Return True or False, or None where that is allowed."""
    if value is None and none:
        return None
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):
        return bool(value)
    either = "True, False, or None" if none else "True or False"
    raise ValueError(f"{name} is {shown(value)}; give {either}.")


def one_of(name: str, value: Any, kind: Any) -> Any:
    """Return one of the strings of a ``Literal``."""
    allowed = get_args(kind)
    if isinstance(value, str) and value in allowed:
        return value
    raise ValueError(f"{name} is {shown(value)}; give one of {', '.join(allowed)}.")


def function_of(name: str, value: Any, form: str, num_arguments: int) -> Any:
    """Return a function that can be called with so many arguments, or None.

    Args:
        name: The argument.
        value: What was given.
        form: How it is called and what it returns: ``"loss(module, batch) -> scalar"``.
        num_arguments: How many positional arguments it gets.

    Raises:
        ValueError: If it is a class, a criterion of outputs and targets, or takes other arguments.
    """
    if value is None:
        return None
    if isinstance(value, type):
        raise ValueError(
            f"{name} is the class {value.__name__}; give {form}, a function that makes use of "
            "it, or None."
        )
    if not callable(value):
        raise ValueError(f"{name} is {shown(value)}; give {form}, or None.")
    if _is_criterion(value):
        raise ValueError(
            f"{name} is {shown(value)}, which compares outputs with targets; give {form}, for "
            f"instance lambda module, batch: criterion(module(batch[0]), batch[1])."
        )
    try:
        signature = inspect.signature(value.forward if isinstance(value, nn.Module) else value)
    except (TypeError, ValueError):
        return value  # written in C, say: found out when it is called
    try:
        signature.bind(*[None] * num_arguments)
    except TypeError as error:
        raise ValueError(f"{name} takes {signature}; give {form}, or None ({error}).") from error
    return value


def _is_criterion(value: Any) -> bool:
    """Return whether something of PyTorch's own compares outputs with targets."""
    if isinstance(value, nn.Module):
        return type(value).__module__ == "torch.nn.modules.loss"
    return getattr(value, "__module__", None) == "torch.nn.functional"


def check_loss(loss: Any) -> None:
    """Raise a ValueError for what is no loss of (module, batch)."""
    function_of("loss", loss, "loss(module, batch) -> scalar", 2)


def batches_of(name: str, value: Any, *, none: bool = False) -> Any:
    """Return an iterable of batches.

    Raises:
        ValueError: If it is none, or one batch or a dataset in the place of several batches,
            whose rows or samples would be taken for batches without a word.
    """
    if value is None and none:
        return None
    else_none = ", or None for the first training batches" if none else ""
    wanted = f"give an iterable of batches{else_none}"
    kind = type(value).__name__
    strange = isinstance(value, (str, bytes)) or not isinstance(value, Iterable)
    if strange and not isinstance(value, Dataset):
        what = shown(value) if isinstance(value, type) else f"of type {kind}"
        raise ValueError(f"{name} is {what}; {wanted}.")
    if isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            if item is None or isinstance(item, (str, bytes, bool, int, float)):
                raise ValueError(f"{name} holds {shown(item)}, which is no batch; {wanted}.")
    if isinstance(value, Dataset) and not isinstance(value, IterableDataset):
        raise ValueError(
            f"{name} is a {kind}, whose items are samples; {wanted}: "
            "DataLoader(dataset, batch_size=64)."
        )
    if isinstance(value, (Tensor, Mapping)) or hasattr(value, "ndim") or _is_one_batch(value):
        raise ValueError(f"{name} is one batch, of type {kind}; {wanted}: [batch].")
    if isinstance(value, Sized) and isinstance(value, (list, tuple)) and not len(value):
        raise ValueError(
            f"{name} is empty: there is no batch to measure on; {wanted} with at least one in it."
        )
    return value


def optimizer_of(name: str, value: Any) -> Any:
    """Return an optimizer or None; whatever has its groups and its state will do."""
    if value is None or (
        not isinstance(value, type)
        and isinstance(getattr(value, "param_groups", None), list)
        and isinstance(getattr(value, "state", None), Mapping)
    ):
        return value
    raise TypeError(
        f"{name} is {shown(value)}; give the torch.optim.Optimizer that trains the module, or None."
    )


def tensor_of(name: str, value: Any, what: str) -> Tensor:
    """Return a tensor."""
    if isinstance(value, Tensor):
        return value
    raise TypeError(f"{name} is {shown(value)}; give {what}, a tensor.")


def text_of(name: str, value: Any, what: str) -> str:
    """Return a text that is not empty."""
    if isinstance(value, str) and value:
        return value
    raise ValueError(f"{name} is {shown(value)}; give {what}, a string.")


def module_of(name: str, value: Any) -> nn.Module:
    """Return a module."""
    if isinstance(value, nn.Module):
        if any(p.requires_grad for p in value.parameters()):
            return value
        raise ValueError(
            f"module is a {type(value).__name__}, which has no trainable parameter: unfreeze one, "
            "or give the module that has them."
        )
    what = shown(value) if isinstance(value, type) else f"of type {type(value).__name__}"
    raise TypeError(f"{name} is {what}; give a torch.nn.Module.")


def tag_of(name: str, value: Any) -> str:
    """Return the first part of tags, which is the name of a folder beside the logs too.

    Raises:
        ValueError: If it is empty, leads out of its folder, or holds what no file is named by.
    """
    allowed = (
        "give the first part of the tags and of file names, such as 'hessian': letters, digits, "
        "spaces and signs, without '/', '\\' or control characters"
    )
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} is {shown(value)}; give the first part of the tags, a string.")
    fits = (
        value.isprintable()
        and value.strip() == value
        and not set("/\\") & set(value)
        and not value.startswith(".")
        and len(value.encode()) <= _LONG
    )
    if not fits:
        raise ValueError(f"{name} is {shown(value)}; {allowed}, and not too long for a file.")
    return value


def scalar_loss(loss: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Tensor]:
    """Return a loss that says what it returned instead of a scalar tensor."""

    def checked(module: nn.Module, batch: Any) -> Tensor:
        found = loss(module, batch)
        if found is None:
            raise SkippedBatchError(
                "the loss returned None for a held batch.",
                "Return a scalar tensor for every batch, or give batches that are not skipped.",
            )
        if not isinstance(found, Tensor):
            raise TypeError(
                f"the loss returned {type(found).__name__}, which nothing can be differentiated "
                "through: return a scalar tensor, without .item() or float()."
            )
        if found.numel() != 1:
            raise ValueError(
                f"the loss returned a tensor of shape {tuple(found.shape)}: return a scalar, the "
                "mean over the batch (reduction='mean')."
            )
        if not found.dtype.is_floating_point:
            raise TypeError(
                f"the loss returned a tensor of {found.dtype}: return a floating-point scalar."
            )
        return found if found.ndim == 0 else found.reshape(())

    return checked


def _number(value: Any) -> int | float | None:
    """Return a number as Python's own; None for what is none."""
    if isinstance(value, Tensor):
        if value.ndim or value.dtype == torch.bool or value.is_complex():
            return None
        value = value.item()
    elif isinstance(value, (bool, str, bytes)) or type(value).__name__ in ("bool_", "bool"):
        return None
    if type(value) in (int, float):
        return value  # type: ignore[no-any-return]
    # Of numpy: numbers by what they can do, arrays are none.
    if getattr(value, "ndim", 0):
        return None
    for convert, method in ((int, "__index__"), (float, "__float__")):
        if hasattr(value, method):
            try:
                return convert(value)
            except Exception:  # noqa: BLE001 - whatever it is, it is no number
                return None
    return None


def _is_one_batch(value: Any) -> bool:
    """Return whether these tensors are inputs and targets, and not batches that are tensors."""
    if not isinstance(value, (list, tuple)) or not value:
        return False
    if not all(isinstance(item, Tensor) for item in value):
        return False
    if len(value) == 1:
        return False
    alike = len({(t.dtype, tuple(t.shape[1:])) for t in value}) == 1
    # A tuple of tensors is what loaders make a batch of.
    return isinstance(value, tuple) or not alike

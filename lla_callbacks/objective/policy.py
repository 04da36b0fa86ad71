"""FSDP2's own arithmetic and what it has gathered, put aside while a measurement computes.

``fully_shard(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))`` gathers copies of
weights, casts inputs and sums gradients in few digits, of which differences of gradients find
none. torch has no public way to change a policy, so it is done by the names below, where a
release has all of them; where it has not, the policy stays, and results say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lla_callbacks.objective.sharded import reshard, units

_MISSING = object()
# What is asked of torch's private classes (found in 2.13 and 2.14), by who has it.
_OF_STATES = ("_mp_policy", "_fsdp_param_groups", "_is_root", "_training_state")
_OF_GROUPS = ("mp_policy", "fsdp_params", "_init_mp_dtypes", "is_sharded", "_all_gather_result")
_OF_PARAMETERS = ("mp_policy", "sharded_param", "all_gather_outputs", "unsharded_accumulated_grad")
# What a parameter or a group keeps from one pass to the next, and a fresh one in its place:
# memory for what is gathered, which has the policy's dtype, and gradients that were not yet
# summed over processes (a user's ``set_requires_gradient_sync(False)``).
_KEPT_BY_PARAMETERS: dict[str, Callable[[], Any] | None] = {
    "all_gather_outputs": list,
    "_unsharded_inner_tensors": list,
    "unsharded_accumulated_grad": lambda: None,
    "_unsharded_param": None,
}


@contextmanager
def put_aside(module: nn.Module, *, full: bool) -> Iterator[None]:
    """Let sharded parts compute inside as if training had left nothing in them.

    All of it is back on leaving, to the bit and as the same objects, whatever is raised: a
    pass that an exception broke off is ended. Nothing is exchanged between processes. Modules
    without sharded parts are left alone.

    Args:
        module: The module.
        full: Whether a ``MixedPrecisionPolicy`` has no effect: parts compute, and sum gradients, in
            the dtype of their weights. Without effect where torch has changed its private classes.
    """
    states = _states(module)
    if states:
        reshard(module)
    if not _are_known(states):
        yield
        return
    saved: list[tuple[Any, str, Any]] = []
    try:
        _swap(states, saved, _full(states, module) if full else {})
        yield
    finally:
        _end_passes(module, states)
        for owner, name, value in reversed(saved):
            if value is _MISSING:
                vars(owner).pop(name, None)
            else:
                setattr(owner, name, value)
        _learn_dtypes(states)


def policy_dtype(module: nn.Module) -> torch.dtype | None:
    """Return the coarsest dtype that ``MixedPrecisionPolicy`` makes a module compute in.

    ``None`` where none is coarser than the weights.
    """
    found = [
        dtype
        for state in _states(module)
        if (policy := getattr(state, "_mp_policy", None)) is not None
        for dtype in (policy.param_dtype, policy.reduce_dtype, policy.output_dtype)
        if dtype is not None
    ]
    own = [p.dtype for p in module.parameters() if p.dtype.is_floating_point] if found else []
    eps = max((torch.finfo(dtype).eps for dtype in own), default=0.0)
    coarser = [dtype for dtype in found if torch.finfo(dtype).eps > eps]
    return max(coarser, key=lambda dtype: torch.finfo(dtype).eps, default=None)


def _states(module: nn.Module) -> list[Any]:
    """Return torch's state of each sharded part; parts that were sharded together share one."""
    found = {}
    for unit in units(module):
        ask = getattr(unit, "_get_fsdp_state", None)
        if ask is not None:
            state = ask()
            found[id(state)] = state
    return list(found.values())


def _groups(states: Iterable[Any]) -> list[Any]:
    return [group for state in states for group in state._fsdp_param_groups]


def _are_known(states: list[Any]) -> bool:
    """Return whether all that is changed is there, and no pass is under way."""

    def have(owners: Iterable[Any], names: Iterable[str]) -> bool:
        return all(hasattr(owner, name) for owner in owners for name in names)

    if not have(states, _OF_STATES):
        return False
    groups = _groups(states)
    if not have(groups, _OF_GROUPS):
        return False
    if not all(group.is_sharded and group._all_gather_result is None for group in groups):
        return False
    return have((p for group in groups for p in group.fsdp_params), _OF_PARAMETERS)


def _full(states: list[Any], module: nn.Module) -> dict[int, Any]:
    """Return by identity of a state a policy that computes in its weights' own dtype."""
    every = [p.dtype for p in module.parameters() if p.dtype.is_floating_point]
    policies = {}
    for state in states:
        own = [p.sharded_param.dtype for group in _groups([state]) for p in group.fsdp_params]
        dtype = next((d for d in [*own, *every] if d.is_floating_point), torch.float32)
        old = state._mp_policy
        # Inputs are still cast, for whoever rounds them before.
        policies[id(state)] = replace(
            old,
            param_dtype=None if old.param_dtype is None else dtype,
            reduce_dtype=None,
            output_dtype=None if old.output_dtype is None else dtype,
        )
    return policies


def _swap(states: list[Any], saved: list[tuple[Any, str, Any]], policies: dict[int, Any]) -> None:
    """Put fresh values in the place of what is kept, noting each before it is changed."""

    def change(owner: Any, name: str, value: Any) -> None:
        saved.append((owner, name, vars(owner).get(name, _MISSING)))
        if value is _MISSING:
            vars(owner).pop(name, None)
        else:
            setattr(owner, name, value)

    for state in states:
        policy = policies.get(id(state))
        if policy is not None:
            change(state, "_mp_policy", policy)
        for group in _groups([state]):
            if policy is not None:
                change(group, "mp_policy", policy)
            if hasattr(group, "_partial_reduce_output"):
                change(group, "_partial_reduce_output", None)
            for parameter in group.fsdp_params:
                if policy is not None:
                    change(parameter, "mp_policy", policy)
                for name, fresh in _KEPT_BY_PARAMETERS.items():
                    change(parameter, name, _MISSING if fresh is None else fresh())
    _learn_dtypes(states)


def _learn_dtypes(states: list[Any]) -> None:
    """Let groups that have computed before read their policies again."""
    for group in _groups(states):
        if hasattr(group, "_reduce_dtype"):
            group._init_mp_dtypes()


def _end_passes(module: nn.Module, states: list[Any]) -> None:
    """Let no part think that it is inside a pass, which an exception has broken off."""
    if any(getattr(state._training_state, "name", "IDLE") != "IDLE" for state in states):
        for unit in units(module):
            if unit._get_fsdp_state()._is_root and hasattr(unit, "reset_iter_state"):
                unit.reset_iter_state()
    reshard(module)

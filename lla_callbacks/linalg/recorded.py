"""A computation noted as its operations, and done again without the Python that led there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_NOTHING: Mapping[int, Tensor] = {}
# Of which the input need not be kept.
_IN_PLACE: dict[Any, Any] = {
    _aten.relu.default: _aten.relu_.default,
    _aten.tanh.default: _aten.tanh_.default,
    _aten.sigmoid.default: _aten.sigmoid_.default,
}


# By which Python gets at numbers without an operation.
_READERS = (
    "numpy", "tolist", "data_ptr", "untyped_storage", "__array__", "__dlpack__", "__reduce_ex__",
)  # fmt: skip
# By which it makes tensors, of numbers or of a list of tensors, whose numbers no operation reads.
_MAKERS = (torch, "tensor"), (torch, "as_tensor"), (Tensor, "new_tensor")
# Of those, the calls that are going on, given nothing but numbers.
_of_numbers: list[str] = []
_SHAPES_BY_NUMBERS = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within this context the operations that torch carries out are noted.

    Those of a ``vmap`` are noted as they are on all points.

    Args:
        most_bytes: What the results of the operations may take, since all are held for as long as
            the recorder is; more, and there is no program.
    """

    def __init__(self, most_bytes: float = float("inf")) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self._left = most_bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is _aten.lift_fresh.default and args[0].ndim and not _of_numbers:
            # Of a list, in which there may have been tensors.
            self._left = -1
        if self._left >= 0 and _kind_of(func).fresh:
            made = _tensors([found])
            self._left -= sum(t.numel() * t.element_size() for t in made)
            if self._left < 0:
                self._calls.clear()
        if self._left >= 0:
            self._calls.append((func, args, kwargs or {}, found))
        return found

    def program(
        self, inputs: Sequence[Tensor], output: Tensor, live: Sequence[Tensor] = ()
    ) -> Program | None:
        """Return what computes the output anew, from other inputs of the same shapes.

        ``None`` if that cannot be: random numbers may be drawn, something is written that is there
        before and after, or numbers are read that depend on the inputs.

        Args:
            inputs: Tensors that the recorded computation began with.
            output: What it ended with.
            live: Tensors that are no inputs, but whose memory is written between two runs of the
                program. Views of them are of that memory, and need not be taken again. Whoever
                gives them has seen that nothing is drawn: attention could, and need not.
        """
        if self._left < 0:
            return None
        slots = {id(t): k for k, t in enumerate(inputs)}
        moving = {_memory(t) for t in live}
        steps: list[Step] = []
        written: set[int] = set()
        read: set[int] = set()
        results: set[int] = set()
        for func, args, kwargs, found in self._calls:
            tensors = _tensors((*args, *kwargs.values()))
            depends = any(id(t) in slots or (moving and _memory(t) in moving) for t in tensors)
            kind = _kind_of(func)
            if kind.draws and not live:
                return None
            changed = _tensors([_get(args, kwargs, k, name) for k, name in kind.written])
            if not depends:
                # A result by another name, such as that of nn.Parameter(...), is no constant.
                if any(_memory(t) in results for t in tensors):
                    return None
                # The same each time, as long as nobody else writes it.
                written |= {_memory(t) for t in changed}
                continue
            if any(id(t) not in slots for t in changed) or (live and _has_own_shape(func, args)):
                return None
            made = [found] if isinstance(found, Tensor) else found
            if not isinstance(made, (list, tuple)) or not all(type(t) is Tensor for t in made):
                return None
            if moving and not kind.fresh and all(_memory(t) in moving for t in made):
                continue
            constants = [t for t in tensors if id(t) not in slots]
            read |= {_memory(t) for t in constants} - moving
            results |= {_memory(t) for t in made}
            for t in made:
                slots.setdefault(id(t), len(slots))
            steps.append(Step(func, args, kwargs, found, slots, kind))
        if id(output) not in slots or (written | results - moving) & read:
            return None
        return Program(steps, len(slots), slots[id(output)])


@contextmanager
def nothing_read() -> Iterator[list[str]]:
    """Within this context it is noted by which methods Python gets at numbers without an operation.

    A recorder sees ``.item()`` and ``bool(...)``, but neither ``.tolist()`` nor ``.numpy()``, nor
    what ``torch.tensor([loss, other])`` reads. A function mode would see them, too, but under one
    torch leaves its fast paths.
    """
    seen: list[str] = []

    def watched(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def called(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return method(*args, **kwargs)

        return called

    def made(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def called(*args: Any, **kwargs: Any) -> Any:
            if any(_lists_tensors(a) for a in (*args, *kwargs.values())):
                seen.append(name)
            _of_numbers.append(name)
            try:
                return method(*args, **kwargs)
            finally:
                _of_numbers.pop()

        return called

    places: list[tuple[Any, str, Any]] = [(Tensor, name, watched) for name in _READERS]
    places += [(place, name, made) for place, name in _MAKERS]
    own = [(place, name, vars(place).get(name)) for place, name, _ in places]
    try:
        for place, name, wrapped in places:
            setattr(place, name, wrapped(name, getattr(place, name)))
        yield seen
    finally:
        for place, name, method in own:
            if method is None:
                delattr(place, name)
            else:
                setattr(place, name, method)


def _lists_tensors(value: Any) -> bool:
    """Return whether there are tensors in a list, or in one within it."""
    return isinstance(value, (list, tuple)) and any(
        isinstance(v, Tensor) or _lists_tensors(v) for v in value
    )


class Step:
    """One operation, with places in a list in the place of tensors that depend on the inputs."""

    def __init__(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        found: Any,
        slots: dict[int, int],
        kind: _Kind,
    ) -> None:
        self.func = self.call = func
        self.args = list(args)
        self.kwargs = dict(kwargs)
        self.places: list[tuple[Any, Any, int]] = []
        for target in (self.args, self.kwargs):
            self._note(target, slots)
        self.one = isinstance(found, Tensor)
        self.made = [slots[id(t)] for t in ([found] if self.one else found)]
        self.taken = {slot for _, _, slot in self.places}
        self.dropped: list[int] = []
        # Whether what it makes has memory of its own, and whether it writes into what it takes.
        self.fresh = kind.fresh
        self.writes = bool(kind.written)

    def _note(self, target: Any, slots: dict[int, int]) -> None:
        keys = list(target) if isinstance(target, dict) else range(len(target))
        for key in keys:
            value = target[key]
            if isinstance(value, Tensor):
                if id(value) in slots:
                    self.places.append((target, key, slots[id(value)]))
                    # Not held, but for the moment of the call.
                    target[key] = None
            elif isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
                target[key] = list(value)
                self._note(target[key], slots)


class Program:
    """Operations in order; see :meth:`Recorder.program`.

    Attributes:
        steps: The operations.
    """

    def __init__(self, steps: list[Step], size: int, output: int) -> None:
        self.steps = steps = _needed(steps, output)
        self._size = size
        self._output = output
        last: dict[int, int] = {}
        # Which tensor's memory each one's is, as far as that is its own.
        roots: dict[int, int] = {}
        owned: set[int] = set()
        for k, step in enumerate(steps):
            for slot in (*step.taken, *step.made):
                last[slot] = k
            for slot in step.made:
                if slot in roots:
                    continue
                if step.fresh:
                    roots[slot] = slot
                    owned.add(slot)
                else:
                    roots[slot] = min((roots.get(s, s) for s in step.taken), default=slot)
        last[output] = len(steps)
        until: dict[int, int] = {}
        for slot, k in last.items():
            root = roots.get(slot, slot)
            until[root] = max(until.get(root, 0), k)
        for k, step in enumerate(steps):
            step.dropped = [s for s in {*step.taken, *step.made} if last[s] == k]
            if step.func in _IN_PLACE and step.taken:
                root = roots.get(next(iter(step.taken)), -1)
                # What it makes has the memory of its own until the end of that.
                if root in owned and until[root] == k:
                    step.func = _IN_PLACE[step.func]
            # Past the overload's own Python.
            step.call = step.func._op

    def reads(self, tensors: Sequence[Tensor]) -> list[bool]:
        """Return which tensors' memory the steps read."""
        read = {
            _memory(t) for step in self.steps for t in _tensors((*step.args, *step.kwargs.values()))
        }
        return [_memory(t) in read for t in tensors]

    def take_out(self, step: Step) -> None:
        """Leave out a step, whose result is given from now on."""
        self.steps = [s for s in self.steps if s is not step]

    def __call__(self, inputs: Sequence[Tensor], given: Mapping[int, Tensor] = _NOTHING) -> Tensor:
        """Return the output for inputs of the recorded shapes.

        Args:
            inputs: In the order of the recording.
            given: Results of the steps that were taken out, by their slot.
        """
        held: list[Any] = [None] * self._size
        held[: len(inputs)] = inputs
        for slot, tensor in given.items():
            held[slot] = tensor
        for step in self.steps:
            for target, key, slot in step.places:
                target[key] = held[slot]
            found = step.call(*step.args, **step.kwargs)
            for target, key, _ in step.places:
                target[key] = None
            if step.one:
                held[step.made[0]] = found
            else:
                for slot, t in zip(step.made, found, strict=True):
                    held[slot] = t
            for slot in step.dropped:
                held[slot] = None
        result: Tensor = held[self._output]
        return result


def _needed(steps: list[Step], output: int) -> list[Step]:
    """Return the steps that the output comes from; what is written in place may be a part of it."""
    needed = {output}
    kept = []
    for step in reversed(steps):
        if step.writes or needed.intersection(step.made):
            needed |= step.taken
            kept.append(step)
    return kept[::-1]


def _has_own_shape(func: Any, args: tuple[Any, ...]) -> bool:
    """Return whether the shape of the result depends on numbers."""
    if any(tag in func.tags for tag in _SHAPES_BY_NUMBERS):
        # Most index by positions, whose number is known.
        if func is not _aten.index.Tensor:
            return True
        return any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1:]))
    return False


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [v for v in value if isinstance(v, Tensor)]
    return found


@dataclass(frozen=True)
class _Kind:
    """What is known of an operation: whether it draws, which arguments it writes, what it makes."""

    draws: bool
    written: tuple[tuple[int, str], ...]
    fresh: bool


@lru_cache(maxsize=1024)
def _kind_of(func: Any) -> _Kind:
    schema = func._schema
    written = tuple(
        (k, argument.name)
        for k, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    fresh = all(found.alias_info is None for found in schema.returns)
    return _Kind(torch.Tag.nondeterministic_seeded in func.tags, written, fresh)


def _get(args: tuple[Any, ...], kwargs: dict[str, Any], k: int, name: str) -> Any:
    return args[k] if k < len(args) else kwargs.get(name)


def _memory(tensor: Tensor) -> int:
    """Return what a tensor's memory is known by under any view."""
    storage = storage_of(tensor)
    return id(tensor) if storage is None else storage


def storage_of(tensor: Tensor) -> int | None:
    """Return what tells a tensor's memory from other memory that is there now, None without any.

    Not its address: to ask for that is to write, in torch's eyes, and lazy copies become real.
    """
    try:
        return tensor.untyped_storage()._cdata  # type: ignore[no-any-return]
    except (RuntimeError, NotImplementedError):
        return None

"""The loss and metrics of an objective at many points, as fast as forward passes allow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lla_callbacks.objective.batches import copies_of, tensors_of
from lla_callbacks.objective.checkpoints import no_checkpoints
from lla_callbacks.objective.checks import function_of, shown, tag_of
from lla_callbacks.objective.copies import Copier
from lla_callbacks.objective.held_loss import HeldLoss
from lla_callbacks.objective.loss import Loss as Loss
from lla_callbacks.objective.loss import Predict as Predict
from lla_callbacks.objective.loss import Statistics as Statistics
from lla_callbacks.objective.loss import load_statistics as load_statistics
from lla_callbacks.objective.randomness import random_marks, stream
from lla_callbacks.objective.repetition import Repetition, keep_processes_apart, repeatable
from lla_callbacks.objective.state import unchanged_weights
from lla_callbacks.objective.training_step import at_place, present_place
from lla_callbacks.objective.twice_differentiable import NoDropout, eager

# Where no metric wants predictions and targets.
_NO_PAIR = torch.empty(0), torch.empty(0)
_NOTHING = nullcontext()


class Evaluator:
    """Evaluates an objective at whatever the weights are, for use in :func:`evaluating`.

    Args:
        objective: Module, batches and loss.
        metrics: Name to a torchmetrics metric, fed with ``predict``'s pairs, or to a function
            ``(module, batch) -> scalar`` that is averaged over samples.
        predict: Gives predictions and targets for torchmetrics. ``None``: the module's own
            output in the loss's forward pass, at no extra cost, against the batch's second
            entry.
        reset: Puts the module back into its starting state.
    """

    def __init__(
        self,
        objective: HeldLoss,
        metrics: Mapping[str, Any],
        predict: Predict | None,
        reset: Repetition,
    ) -> None:
        self.objective = objective
        self.batches = [objective.fresh(i) for i in range(len(objective.batches))]
        self._copies = [copies_of(batch, objective.device) for batch in self.batches]
        self._reset = reset
        self._predict = predict
        self.functions = {k: f for k, f in metrics.items() if not is_metric(f)}
        self.metrics = {
            k: deepcopy(m).to(objective.device) for k, m in metrics.items() if is_metric(m)
        }
        # Whose outputs metrics are fed with.
        self._gives = next((m.gives for m in metrics.values() if hasattr(m, "gives")), None)
        for metric in self.metrics.values():
            if isinstance(metric, nn.Module):
                keep_processes_apart(metric)
        # Some losses differentiate on their own way (physics-informed ones, penalties).
        tensors = [t for batch in self.batches for t in tensors_of(batch)]
        self.needs_grad = any(t.requires_grad for t in tensors)
        self._silence = objective.silencer()
        # Looking at every function of a forward pass costs a small network as much as the pass,
        # so it ends once all batches went through without any dropout.
        known = objective.dropout or (reset.drops_nothing and not metrics)
        self._no_dropout = None if known else NoDropout()

    def __call__(self, statistics: Statistics | None = None) -> Tensor:
        """Return loss and metrics, shape ``(1 + len(metrics),)``, float64 on the CPU.

        The metrics come in the order torchmetrics first, then functions; see :attr:`names`.

        Args:
            statistics: Running statistics of batch norms, which count in every mode; ``None``:
                the module's own, or those of the present weights in mode ``"recalibrate"``.
        """
        return torch.tensor(self.row(statistics), dtype=torch.float64)

    def row(self, statistics: Statistics | None = None) -> list[float]:
        """Return loss and metrics as numbers; see :meth:`__call__`."""
        if self.objective.mode == "recalibrate" and statistics is None:
            statistics = self.statistics()
        statistics = statistics or ()
        losses, others = [], [[] for _ in self.functions]  # type: ignore[var-annotated]
        for metric in self.metrics.values():
            metric.reset()
        for i in range(len(self.batches)):
            loss, pair = self.run(i, statistics)
            losses.append(loss)
            for metric in self.metrics.values():
                metric.update(*pair)
            for values, function in zip(others, self.functions.values(), strict=True):
                values.append(_scalar(self._guarded(i, function, statistics)))
        if self._no_dropout is not None and not self._no_dropout.active:
            self._no_dropout = None
            self._reset.drops_nothing = True
        results = [self._mean(losses)]
        results += [_number(k, m.compute()) for k, m in self.metrics.items()]
        results += [self._mean(values) for values in others]
        return results

    @property
    def names(self) -> list[str]:
        """Names of the metrics, in the order of the results."""
        return [*self.metrics, *self.functions]

    def _mean(self, values: list[Tensor]) -> float:
        """Return the mean over samples, added up as doubles in the order of the batches."""
        if len(values) == 1:
            return float(values[0].item())
        return self.means(values)[0]

    def run(self, i: int, statistics: Statistics = ()) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the loss of batch ``i`` and, if metrics want them, predictions and targets."""
        if not self.metrics:
            return self._guarded(i, self.objective.loss, statistics), _NO_PAIR
        if self._predict is not None:
            loss = self._guarded(i, self.objective.loss, statistics)
            pair = self._guarded(i, self._predict, statistics)
            return loss, (pair[0].detach(), pair[1])
        target = _target(self.batches[i])
        outputs: list[Any] = []

        def observed(module: nn.Module, batch: Any) -> Tensor:
            # Inside, after the reset, which takes away what hooks were put on meanwhile.
            outputs.clear()
            gives = self._gives or module
            hook = gives.register_forward_hook(lambda m, a, out: outputs.append(out))
            try:
                return self.objective.loss(module, batch)
            finally:
                hook.remove()

        loss = self._guarded(i, observed, statistics)
        if len(outputs) != 1 or not isinstance(outputs[0], Tensor):
            # The loss does not call the module just once: a pass of its own.
            outputs = [self._guarded(i, _first_entry_through, statistics)]
        return loss, (outputs[0].detach(), target)

    def start(self, i: int) -> Copier:
        """Put the module into its starting state and return what copies batch ``i``."""
        copier = self._reset(stream(self.objective.seed, self.objective.place(i)))
        self._silence()
        self._reset.watch()
        return copier

    @property
    def is_steady(self) -> bool:
        """Whether passes so far wrote nothing that has to be copied anew."""
        return self._reset.is_watched

    @property
    def settled(self) -> Callable[[Copier], bool]:
        """What looks after a pass; see :meth:`Repetition.settled`."""
        return self._reset.settled

    def without_dropout(self) -> AbstractContextManager[object]:
        """Return the context in which functional dropout does nothing, as far as there is any."""
        return self._no_dropout or _NOTHING

    def means(self, values: Sequence[float | Tensor]) -> list[float]:
        """Return the mean over samples of each row of losses, which has one for each batch."""
        counts = self.objective.counts
        total = sum(counts)
        # One wait for the device in all.
        numbers = iter(_numbers(values))
        if len(counts) == 1:
            return list(numbers)
        rows = range(len(values) // len(counts))
        return [float(sum(n / total * next(numbers) for n in counts)) for _ in rows]

    def _guarded(self, i: int, function: Callable[[Any, Any], Any], statistics: Statistics) -> Any:
        """Call a function of (module, batch) from the starting state."""
        place = self.objective.place(i)
        copier = self.start(i)
        if statistics:
            load_statistics(statistics)
        module = self.objective.module
        with torch.set_grad_enabled(self.needs_grad):
            try:
                unknown = self.objective.findings.proof.quiet is None
                before = random_marks() if unknown else None
                with self._no_dropout or _NOTHING:
                    # A step may write into its batch, seen or unseen.
                    batch = self._copies[i](copier)
                    with at_place(place) if place != present_place() else _NOTHING:
                        found = function(module, batch)
                    if copier.refusals:
                        raise copier.refusals[0]
                if not unknown:
                    return found
                if before == random_marks():
                    self.objective.findings.learn(quiet=())
                    return found
                del found
            except RuntimeError as error:
                # "does not require grad", "doesn't require gradient": the step wants a graph.
                if self.needs_grad or "require grad" not in str(error):
                    raise
                self.needs_grad = True
                return self._guarded(i, function, statistics)
        # Something was drawn: what it was for is found out, and the pass made again.
        self.objective.learn_randomness(self.objective.batches[i], statistics, place)
        self._silence = self.objective.silencer()
        return self._guarded(i, function, statistics)

    @property
    def norms(self) -> list[_BatchNorm]:
        """Batch norms whose running statistics are estimated in mode ``"recalibrate"``."""
        training = self.objective.training or {}
        return [
            m for m in self.objective.module.modules()
            if isinstance(m, _BatchNorm) and m.track_running_stats and training.get(m, True)
        ]  # fmt: skip

    def statistics(self) -> Statistics:
        """Return the batch norms' statistics at the present weights, over all batches.

        The cumulative average over batches, each with its share of the samples, of what
        training-mode batch norm would record, as ``update_bn`` of Garipov et al. 2018.
        """
        norms = self.norms
        found: Statistics = ()
        seen = 0

        def observe(module: nn.Module, batch: Any) -> Tensor:
            for m in norms:
                m.training, m.momentum = True, share
            return self.objective.loss(module, batch)

        for i, count in enumerate(self.objective.counts if norms else ()):
            seen += count
            share = count / seen
            self._guarded(i, observe, found)
            found = [(m, _known(m.running_mean), _known(m.running_var)) for m in norms]
        return found


@contextmanager
def evaluating(
    objective: HeldLoss,
    *,
    metrics: Mapping[str, Any] | None = None,
    predict: Predict | None = None,
    check_weights: bool = True,
) -> Iterator[Evaluator]:
    """Within this context an objective can be evaluated many times; all is restored after.

    Raises:
        ValueError: If torchmetrics are asked for and a batch is no pair, without ``predict``.
    """
    held = objective.held_open
    with ExitStack() as stack:
        if held is None:
            reset = _guarded(objective, stack, check_weights)
        else:
            reset = stack.enter_context(held.used(lambda own: _guarded(objective, own, False)))
            if check_weights:
                stack.enter_context(unchanged_weights(objective.module))
        yield Evaluator(objective, metrics or {}, predict, reset)


def _guarded(objective: HeldLoss, stack: ExitStack, check_weights: bool) -> Repetition:
    """Enter the guard, and return what puts the module back into its starting state."""
    reset = stack.enter_context(
        repeatable(
            objective.module,
            seed=objective.seed,
            mode=objective.mode,
            dropout=objective.dropout,
            training=objective.training,
            check_weights=check_weights,
            widen=objective.widens,
            loss=objective.loss,
        )
    )
    # Compiled modules run eagerly, so that they have the values that their curvature is of.
    stack.enter_context(eager())
    # Nothing is differentiated, which reentrant checkpoints would warn about.
    stack.enter_context(no_checkpoints(verify=False))
    # In full precision: autocast would cost digits of small differences, not time.
    stack.enter_context(torch.autocast(objective.device.type, enabled=False))
    stack.enter_context(objective.autocast_inside())
    return reset


def is_metric(thing: Any) -> bool:
    """Return whether this is a torchmetrics metric, known by its methods."""
    return all(callable(getattr(thing, name, None)) for name in ("update", "compute", "reset"))


def check_metrics(metrics: Mapping[str, Any] | None, predict: Predict | None) -> None:
    """Raise a ValueError if metrics are not what :class:`Evaluator` takes."""
    if metrics is not None and not isinstance(metrics, Mapping):
        raise ValueError(
            f"metrics is of type {type(metrics).__name__}; give a dict of name to a torchmetrics "
            "metric or a function (module, batch) -> scalar, or None."
        )
    for name, metric in (metrics or {}).items():
        if not isinstance(name, str) or not name or name == "loss":
            raise ValueError(f"metrics has the name {shown(name)}; give a name other than 'loss'.")
        tag_of(f"the name {name!r} in metrics", name)
        if isinstance(metric, type) or not (is_metric(metric) or callable(metric)):
            what = "the class" if isinstance(metric, type) else "of type"
            kind = metric if isinstance(metric, type) else type(metric)
            raise ValueError(
                f"metrics[{name!r}] is {what} {kind.__name__}; give a torchmetrics metric, made "
                "with its settings, or a function (module, batch) -> scalar."
            )
        if not is_metric(metric):
            function_of(f"metrics[{name!r}]", metric, "a function (module, batch) -> scalar", 2)
    function_of("predict", predict, "predict(module, batch) -> (preds, target)", 2)


def _known(statistic: Tensor | None) -> Tensor:
    assert statistic is not None
    return statistic.detach().clone()


def _target(batch: Any) -> Tensor:
    if isinstance(batch, Sequence) and len(batch) >= 2 and isinstance(batch[1], Tensor):
        return batch[1]
    raise ValueError(
        f"a batch of type {type(batch).__name__} is no pair of inputs and targets, so metrics do "
        "not know what to compare: give predict=callable(module, batch) -> (predictions, targets)."
    )


def _first_entry_through(module: nn.Module, batch: Any) -> Any:
    try:
        return module(batch[0])
    except NotImplementedError as error:
        raise ValueError(
            f"{type(module).__name__} has no forward that metrics could be fed from: give "
            "predict=callable(module, batch) -> (predictions, targets)."
        ) from error


def _numbers(values: Sequence[float | Tensor]) -> list[float]:
    tensors = [v.detach().reshape(()) for v in values if isinstance(v, Tensor)]
    if len(tensors) < len(values) or not tensors:
        return [float(v) for v in values]
    found: list[float] = torch.stack(
        [v.float() if v.dtype != torch.float64 else v for v in tensors]
    ).tolist()
    return found


def _scalar(value: Any) -> Tensor:
    found = torch.as_tensor(value).detach()
    if found.numel() != 1:
        raise ValueError(
            f"a metric function returned shape {tuple(found.shape)}; return one number a batch."
        )
    return found.reshape(())


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(
        f"metrics[{name!r}] computes {shape}, not one number: choose an average, such as "
        "average='macro'."
    )

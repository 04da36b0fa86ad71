"""Each way in which a measurement fails, with what its message says to do, and that done."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lla_callbacks import ConvexityMap, LossLine, connect, measure_hessian
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.penalty.displacement import DisplacedLoss
from lla_callbacks.penalty.penalty import PenaltySettings, penalty_gradient
from tests.kinds import Bag, OnceCube, cross_entropy, tanh_net, vectors

Action = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One message.

    Attributes:
        name: What happens.
        remedy: The remedy, or the part of it that no number stands in.
        wrong: Fails with it, or leaves gaps with it in the summary.
        mended: Does what the remedy says, one for each way that it offers.
        never: What the message must not advise.
    """

    name: str
    remedy: str
    wrong: Action
    mended: dict[str, Action]
    never: str = "\0"


def measure(
    module: nn.Module | None = None, batches: Any = None, loss: Any = cross_entropy, **settings: Any
) -> Any:
    """Measure little; numbers of the network are the same at every call."""
    torch.manual_seed(1)
    module = tanh_net().double() if module is None else module
    batches = [vectors()] if batches is None else batches
    return measure_hessian(
        module, batches, loss=loss, **{"num_steps": 3, "num_probes": 2, **settings}
    )


class Walled(nn.Module):
    """One of its weights is just beside the end of where its loss exists."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 2.0, 1e-14], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, :3] * self.w).sum(1).square() - self.w.log().sum() * 1e-16


def mean_of(module: Any, batch: Any) -> Tensor:
    return module(batch[0]).mean()


def with_a_block(module: Any, batch: Any) -> Tensor:
    """Return a loss of which a part cannot be differentiated twice."""
    return mean_of(module, batch) + OnceCube.apply(module.w[0]).square()


class Padded(nn.Module):
    """Its padding vector is a weight of its head."""

    def __init__(self, once: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(6, 4, padding_idx=0)
        self.once = once
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x).mean(1)
        return self.head(OnceCube.apply(hidden) if self.once else hidden**3)


def padded(once: bool = False, **settings: Any) -> Any:
    batches = [(torch.randint(6, (16, 3)), torch.randint(6, (16,)))]
    return measure(Padded(once).double(), batches, **settings)


def bag(once: bool = True, **settings: Any) -> Any:
    module = Bag("sum").double()
    tokens = torch.randint(0, 5, (6, 4)), torch.randint(0, 3, (6,))

    def added_up(module: Any, batch: Any) -> Tensor:
        hidden = F.embedding(batch[0], module.embedding.weight).sum(1)
        return F.cross_entropy(module.head(hidden.tanh()), batch[1])

    return measure(module, [tokens], cross_entropy if once else added_up, **settings)


class OneBatch(nn.Module):
    """Its batch sees itself: the centre of the batch is taken out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Limited(torch.autograd.Function):
    """Its second derivative needs more memory than there is, for more than four samples."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled() and len(x) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory, as ordered")
        return gradient * (1 - x.tanh().square())


class Long(Limited):
    """The same for one sample, which is long."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory, as ordered")
        return Limited.backward(ctx, gradient)


def limited(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(Limited.apply(module(batch[0])), batch[1])


def long(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(Long.apply(module(batch[0])), batch[1])


def batch_of(count: int) -> Any:
    source = torch.Generator().manual_seed(3)
    x = torch.randn(count, 4, generator=source, dtype=torch.float64)
    return x, torch.randint(0, 3, (count,), generator=source)


def relu_net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    wide = nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
    return nn.Sequential(*wide).to(dtype)


def kinked(
    dtype: torch.dtype = torch.float32, count: int = 256, loss: Any = cross_entropy, **settings: Any
) -> Any:
    x, y = batch_of(count)
    return measure(relu_net(dtype), [(x.to(dtype), y)], loss, **settings)


def spoken(module: Any, batch: Any) -> Tensor:
    """Return a connectionist loss, which has no second derivative."""
    logits = F.log_softmax(module(batch[0]), -1).reshape(16, -1, 3)
    n = logits.shape[1]
    return F.ctc_loss(
        logits, torch.ones(n, 4, dtype=torch.long), torch.full((n,), 16), torch.full((n,), 4)
    )


def graphs() -> Any:
    """Two graphs whose first tensor is a list of edges."""

    def graph(nodes: int) -> Any:
        return {"edges": torch.zeros(2, 7, dtype=torch.long), "x": batch_of(nodes)[0]}

    return [graph(4), graph(6)]


def of_graph(module: Any, batch: Any) -> Tensor:
    return module(batch["x"]).square().mean()


class Feeding(nn.Module):
    """Keeps an iterator, which training takes from."""

    def __init__(self, feed: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = tanh_net()
        self.feed = feed


def fed(module: Any, batch: Any) -> Tensor:
    extra = next(module.feed) if isinstance(module.feed, Iterator) else module.feed[0]
    return F.cross_entropy(module.net(batch[0] + extra), batch[1])


def of_batch(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module.net(batch[0]), batch[1])


def doubtful(power: float, at: float = 0.0) -> Any:
    """Measure a power of a weight that is zero."""
    module = nn.Linear(4, 3).double()
    nn.init.zeros_(module.bias)
    return measure(module, loss=lambda m, b: cross_entropy(m, b) + ((m.bias + at) ** power).sum())


def in_one_memory(how: str) -> nn.Module:
    """Two layers of one weight, in several ways."""
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    first, _, last = module
    if how == "tied":
        last.weight = first.weight
    else:
        last.weight.data = first.weight.data.clone() if how == "clone" else first.weight.data
    return module


class Clipped(nn.Module):
    """Its forward pass changes its weights."""

    def __init__(self, most: float | None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(6, 3, max_norm=most)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x).tanh().sum(1)


def clipped(loss: Any = cross_entropy) -> Any:
    tokens = torch.randint(0, 5, (6, 4)), torch.randint(0, 3, (6,))
    return measure(Clipped(0.1).double(), [tokens], loss)


class Counting:
    """A loss that depends on how often it was called, or is missing then."""

    def __init__(self, kind: str) -> None:
        self.kind, self.calls = kind, 0

    def __call__(self, module: Any, batch: Any) -> Any:
        self.calls += 1
        if self.kind == "moves":
            return cross_entropy(module, batch) * (1 + 0.01 * self.calls)
        missing = self.kind == "never" or self.calls == 1
        return None if missing else cross_entropy(module, batch)


def penalized(
    estimator: str, evaluate: Callable[[nn.Module], Tensor], strength: float = 1e-3,
    max_ratio: float | None = None,
) -> float:  # fmt: skip
    """Return the norm of a penalty's gradient."""
    torch.manual_seed(1)
    module = tanh_net().double()
    space = ParameterSpace(dict(module.named_parameters()))
    around = DisplacedLoss(lambda: evaluate(module), space, space.names, key=(0,))
    found = penalty_gradient(
        around,
        strength,
        PenaltySettings(estimator, 1, False),  # type: ignore[arg-type]
        with_task=False,
        compare=True,
        max_ratio=max_ratio,
    )
    return float(space.flatten(found.gradient).norm())


def native_norm(module: Any) -> Tensor:
    x, y = batch_of(6)
    hidden = torch.native_layer_norm(module[0](x), [5], None, None, 1e-5)[0]
    return F.cross_entropy(module[2](hidden), y)


def functional_norm(module: Any) -> Tensor:
    x, y = batch_of(6)
    return F.cross_entropy(module[2](F.layer_norm(module[0](x), [5])), y)


def steep(module: Any) -> Tensor:
    """Return a loss that overflows a little away from the weights."""
    return cross_entropy(module, batch_of(6)) + (200 * module[0].weight).exp().sum() * 1e-80


def connected(lr: float) -> float:
    ends = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        ends.append(tanh_net().double().state_dict())
    found = connect(
        tanh_net().double(),
        [batch_of(8)],
        *ends,
        loss=lambda m, b: m(b[0]).square().square().mean(),
        lr=lr,
        epochs=6,
    )
    return float(next(iter(found.points[1].values())).sum())


def is_number(found: Any) -> bool:
    """Return whether something was measured, and nothing is missing."""
    if isinstance(found, float):
        return math.isfinite(found)
    if isinstance(found, (LossLine, ConvexityMap)):
        values = found.loss if isinstance(found, LossLine) else found.lambda_max
        return bool(values.isfinite().all())
    return not found.gaps and math.isfinite(found.trace + float(found.lambda_max))

"""The table of failures and of what their messages say to do, for ``tests/test_remedies.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lla_callbacks import convexity_map, hessian_operator, loss_line
from tests.kinds import (
    Calling,
    Cube,
    DetachedCube,
    OnceCube,
    cross_entropy,
    library_cube,
    tanh_net,
    vectors,
)
from tests.objective.test_self_check import bootstrapped, deep_equilibrium
from tests.remedies import (
    Case,
    Counting,
    Feeding,
    OneBatch,
    Walled,
    bag,
    batch_of,
    clipped,
    connected,
    doubtful,
    fed,
    functional_norm,
    graphs,
    in_one_memory,
    kinked,
    limited,
    long,
    mean_of,
    measure,
    native_norm,
    of_batch,
    of_graph,
    padded,
    penalized,
    spoken,
    steep,
    with_a_block,
)

WALL = [(torch.ones(2, 4, dtype=torch.float64),)]
STATE = [(torch.randn(8, 3, dtype=torch.float64),)]
SETTLED = {"loss": deep_equilibrium(hook=True), "num_steps": 3}


def calling(function: Any, **settings: Any) -> Any:
    torch.manual_seed(1)
    return measure(Calling(function).double(), **settings)


def distances(module: Any, batch: Any, *, written: bool = False) -> Any:
    x = module(batch[0])
    found = torch.cdist(x, batch[0][:, :3]) if not written else None
    if found is None:
        found = (x[:, None] - batch[0][None, :, :3]).square().sum(-1).sqrt()
    return found.square().mean()


def sharpest_line(**settings: Any) -> Any:
    torch.manual_seed(1)
    module, alphas = tanh_net().double(), [-1.0, 0.0, 1.0]
    return loss_line(
        module, [vectors()], loss=bootstrapped, directions="top1", alphas=alphas, **settings
    )


def curvature_map(**settings: Any) -> Any:
    torch.manual_seed(1)
    return convexity_map(
        tanh_net().double(), [vectors()], loss=bootstrapped, alphas=[0.0], betas=[0.0],
        num_steps=3, **settings,
    )  # fmt: skip


def gauss_newton(loss: Any, matrix: str = "ggn") -> float:
    torch.manual_seed(1)
    operator = hessian_operator(tanh_net().double(), [vectors()], loss=loss, matrix=matrix)
    return float((operator @ torch.ones(operator.shape[0], dtype=torch.float64)).norm())


CASES = [
    Case(
        "weights too coarse for differences",
        "Leave out precision='training'",
        lambda: measure(
            tanh_net().bfloat16(), [(vectors()[0].bfloat16(), vectors()[1])],
            engine="difference", precision="training",
        ),
        {"left out": lambda: measure(
            tanh_net().bfloat16(), [(vectors()[0].bfloat16(), vectors()[1])], engine="difference",
        )},
    ),
    Case(
        "a padding vector that is a weight elsewhere",
        "Take engine='exact'.",
        lambda: padded(engine="difference"),
        {"exact": lambda: padded(engine="exact")},
    ),
    Case(
        "the same where the exact engine was tried",
        "Give loss=callable(module, batch) by operations that differentiate twice.",
        lambda: padded(once=True),
        {"operations": padded},
        never="engine='exact'",
    ),
    Case(
        "no loss beside the weights",
        "Take engine='exact'.",
        lambda: measure(Walled(), WALL, mean_of, engine="difference", check=False),
        {"exact": lambda: measure(Walled(), WALL, mean_of, engine="exact")},
    ),
    Case(
        "the same where the exact engine was tried",
        "Give loss=callable(module, batch) by operations that differentiate twice.",
        lambda: measure(Walled(), WALL, with_a_block, check=False),
        {"operations": lambda: measure(Walled(), WALL, mean_of)},
        never="engine='exact'",
    ),
    Case(
        "a gradient that is no derivative",
        "Give loss=callable(module, batch) whose gradient is its derivative, or set "
        "jacobian='measure'",
        lambda: measure(loss=bootstrapped),
        {
            "loss": measure,
            "jacobian": lambda: measure(loss=bootstrapped, jacobian="measure"),
        },
    ),
    *(
        Case(
            f"the same in a {name}",
            "or set jacobian='measure'",
            lambda slice_of=slice_of: slice_of(),
            {"jacobian": lambda slice_of=slice_of: slice_of(jacobian="measure")},
        )
        for name, slice_of in {"line": sharpest_line, "map": curvature_map}.items()
    ),
    Case(
        "a loss that does not repeat",
        "Keep such state on the module, or give loss=callable(module, batch) without it; "
        "check=False",
        lambda: measure(loss=Counting("moves")),
        {"loss": measure, "check": lambda: measure(loss=Counting("moves"), check=False)},
    ),
    Case(
        "a hook that is part of the derivative",
        "Take engine='difference', or let loss=callable(module, batch) do without the hook.",
        lambda: measure(nn.Linear(3, 3).double(), STATE, engine="exact", **SETTLED),
        {
            "difference": lambda: measure(
                nn.Linear(3, 3).double(), STATE, engine="difference", **SETTLED
            ),
            "loss": lambda: measure(
                nn.Linear(3, 3).double(), STATE, deep_equilibrium(hook=False), engine="exact"
            ),
        },
    ),
    Case(
        "a second derivative that is lost",
        "Take engine='difference', or replace the operation",
        lambda: calling(DetachedCube.apply, engine="exact"),
        {
            "difference": lambda: calling(DetachedCube.apply, engine="difference"),
            "operation": lambda: calling(Cube.apply, engine="exact"),
        },
    ),
    Case(
        "no second derivative",
        "Or take engine='auto', which measures what differences can tell.",
        lambda: calling(OnceCube.apply, engine="exact"),
        {"auto": lambda: calling(OnceCube.apply)},
    ),
    *(
        Case(
            f"no second derivative: {name}",
            "Give loss=callable(module, batch) that avoids it, or let its backward pass",
            lambda function=function: calling(function, engine="exact"),
            {
                "loss": lambda function=function: calling(
                    function, engine="exact", loss=lambda m, b: m.a(b[0]).square().mean()
                ),
                "backward pass": lambda: calling(Cube.apply, engine="exact"),
            },
        )
        for name, function in {"marked": OnceCube.apply, "operator": library_cube}.items()
    ),
    Case(
        "no second derivative: bags",
        "Use nn.Embedding and add up its vectors",
        lambda: bag(engine="exact"),
        {"embedding": lambda: bag(once=False, engine="exact")},
    ),
    Case(
        "weights that a forward pass clips",
        "Give loss=callable(module, batch) that leaves them alone.",
        clipped,
        {"loss": lambda: clipped(lambda m, b: m.embed.weight[b[0]].tanh().mean())},
    ),
    Case(
        "samples that see each other",
        "Leave out microbatch_size, or use mode='eval' where batch statistics are the cause.",
        lambda: measure(OneBatch().double(), microbatch_size=2),
        {
            "left out": lambda: measure(OneBatch().double()),
            "eval": lambda: measure(OneBatch().double(), microbatch_size=2, mode="eval"),
        },
    ),
    Case(
        "parts that fail",
        "Leave out microbatch_size, or use mode='eval' where batch statistics are the cause.",
        lambda: measure(OneBatch().double(), microbatch_size=1),
        {
            "left out": lambda: measure(OneBatch().double()),
            "eval": lambda: measure(OneBatch().double(), microbatch_size=1, mode="eval"),
        },
    ),
    Case(
        "weights in one memory",
        "Let a copy have memory of its own, by .detach().clone(), and tie weights by assigning",
        lambda: measure(in_one_memory("data")),
        {
            "clone": lambda: measure(in_one_memory("clone")),
            "tied": lambda: measure(in_one_memory("tied")),
        },
    ),
    Case(
        "a product that is not finite",
        "Look for a function whose second derivative diverges",
        lambda: doubtful(1.5),
        {"function": lambda: doubtful(2)},
    ),
    Case(
        "a gradient that is not finite",
        "Look for a division by zero or an overflow in the model at these weights.",
        lambda: doubtful(0.5),
        {"weights": lambda: doubtful(0.5, at=1.0)},
    ),
    Case(
        "a loss that is not finite",
        "Lower the learning rate, clip gradients, or look for bad samples in that batch.",
        lambda: doubtful(-1),
        {"weights": lambda: doubtful(-1, at=1.0)},
    ),
    Case(
        "no memory for a batch whose samples see each other",
        "Lower num_samples, give a dataloader of smaller batches, or take mode='eval' or "
        "engine='difference'.",
        lambda: measure(OneBatch().double(), [batch_of(8)], limited, engine="exact"),
        {
            "smaller batches": lambda: measure(
                OneBatch().double(), [batch_of(4), batch_of(4)], limited, engine="exact"
            ),
            "eval": lambda: measure(
                OneBatch().double(), [batch_of(8)], limited, engine="exact", mode="eval"
            ),
            "difference": lambda: measure(
                OneBatch().double(), [batch_of(8)], limited, engine="difference"
            ),
        },
    ),
    Case(
        "no memory for one sample",
        "Lower num_samples or num_steps, or give a dataloader of smaller batches. Or set "
        "engine='difference', which needs no more than a training step.",
        lambda: measure(None, [batch_of(1)], long, engine="exact"),
        {"difference": lambda: measure(None, [batch_of(1)], long, engine="difference")},
    ),
    Case(
        "more than max_memory",
        "Raise max_memory, lower the batch size, or take engine='difference'.",
        lambda: measure(OneBatch().double(), [batch_of(64)], max_memory=1, engine="exact"),
        {
            "raised": lambda: measure(
                OneBatch().double(), [batch_of(64)], max_memory=10**8, engine="exact"
            ),
            "difference": lambda: measure(
                OneBatch().double(), [batch_of(64)], max_memory=1, engine="difference"
            ),
        },
    ),
    Case(
        "batches that do not tell their size",
        "Give batch_size=, a number of samples or callable(batch) that returns it.",
        lambda: measure(None, graphs(), of_graph),
        {
            "number": lambda: measure(None, graphs(), of_graph, batch_size=5),
            "function": lambda: measure(
                None, graphs(), of_graph, batch_size=lambda b: len(b["x"])
            ),
        },
    ),
    Case(
        "a size that is none",
        "Let it return a whole number of at least 1.",
        lambda: measure(None, graphs(), of_graph, batch_size=lambda b: "x"),
        {"number": lambda: measure(None, graphs(), of_graph, batch_size=lambda b: len(b["x"]))},
    ),
    Case(
        "no loss for any batch",
        "Give loss=callable(module, batch) that returns one, or dataloader= with batches that "
        "are not skipped.",
        lambda: measure(loss=Counting("never")),
        {"loss": measure},
    ),
    Case(
        "no loss for a batch, once",
        "Give loss=callable(module, batch) that returns one for every batch.",
        lambda: measure(loss=Counting("once"), check=False),
        {"loss": measure},
    ),
    Case(
        "a step that takes from training",
        ", or dataloader= with batches that hold all that the loss needs; or let the module hold "
        "what copy.deepcopy can copy.",
        lambda: measure(Feeding(float(i) for i in range(99)).double(), loss=fed),
        {
            "loss": lambda: measure(Feeding(float(i) for i in range(99)).double(), loss=of_batch),
            "copyable": lambda: measure(Feeding([1.0]).double(), loss=fed),
        },
    ),
    Case(
        "kinks, by differences that were asked for",
        "Set engine='exact' or 'auto'.",
        lambda: kinked(engine="difference"),
        {"exact": lambda: kinked(engine="exact"), "auto": kinked},
    ),
    Case(
        "kinks, and no second derivative",
        "Measure in float64, where differences are surer (measure_hessian(module.double(), "
        "batches)), or give loss=callable(module, batch) by operations that differentiate twice.",
        lambda: kinked(loss=spoken),
        {"float64": lambda: kinked(torch.float64, loss=spoken), "operations": kinked},
        never="engine='exact'",
    ),
    Case(
        "kinks, and no memory",
        "Raise max_memory, or lower num_samples or the size of the held batches.",
        lambda: kinked(loss=long),
        {"raised": kinked},
    ),
    Case(
        "a run that ended early",
        "Leave out eig_rtol for them",
        lambda: kinked(eig_rtol=0.5, num_steps=20),
        {"left out": lambda: kinked(num_steps=20)},
        never="float64",
    ),
    Case(
        "a curve that diverges",
        "Lower lr, or give networks that have trained.",
        lambda: connected(1e30),
        {"lr": lambda: connected(1e-3)},
    ),
    Case(
        "a loss without a criterion",
        "(or their modules), or use estimator='perturbation'.",
        lambda: penalized("gauss_newton", lambda m: m(batch_of(6)[0]).square().sum()),
        {
            "criterion": lambda: penalized(
                "gauss_newton", lambda m: cross_entropy(m, batch_of(6))
            ),
            "perturbation": lambda: penalized(
                "perturbation", lambda m: m(batch_of(6)[0]).square().sum()
            ),
        },
    ),
    Case(
        "an operator of a loss without a criterion",
        "Take matrix='hessian', or compute the loss by one of torch.nn.functional's",
        lambda: gauss_newton(lambda m, b: m(b[0]).square().mean()),
        {
            "hessian": lambda: gauss_newton(lambda m, b: m(b[0]).square().mean(), "hessian"),
            "criterion": lambda: gauss_newton(cross_entropy),
        },
    ),
    Case(
        "a third derivative that is wrong in torch",
        "Use estimator='perturbation', or normalize by torch.nn.functional's",
        lambda: penalized("exact", native_norm),
        {
            "perturbation": lambda: penalized("perturbation", native_norm),
            "functional": lambda: penalized("exact", functional_norm),
        },
    ),
    Case(
        "a penalty that is not finite",
        "Lower the strength or the learning rate, or set max_ratio.",
        lambda: penalized("perturbation", steep, strength=1e4),
        {"strength": lambda: penalized("perturbation", steep, strength=1e-3)},
    ),
]  # fmt: skip

"""Ctrl-C at every instant of an evaluation: all is put back, and the interrupt is not lost."""

import contextlib
import random
import signal
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lla_callbacks.objective import interrupts
from lla_callbacks.objective.interrupts import held_back, shielded
from lla_callbacks.objective.objective import Objective
from lla_callbacks.objective.state import take_snapshot, weights_at

PACKAGE = interrupts.__file__.rsplit("/", 1)[0]
# Where the guard runs, beside the package: what enters and leaves its parts.
WATCHED = (PACKAGE, contextlib.__file__)


class Restless(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.items = []

    def forward(self, x):
        self.items.append(1)
        self.frozen.weight.data.add_(1)
        return self.net(x + torch.rand(1) + random.random())


def loss(module, batch):
    return cross_entropy(module(batch[0]), batch[1])


def state_of(module):
    return {
        "weights": {k: (id(p), p.detach().clone()) for k, p in module.named_parameters()},
        "buffers": {k: (id(b), b.clone()) for k, b in module.named_buffers()},
        "gradients": [p.grad if p.grad is None else p.grad.clone() for p in module.parameters()],
        "items": (id(module.items), list(module.items)),
        "modes": [m.training for m in module.modules()],
        "random": [torch.get_rng_state(), random.getstate(), str(np.random.get_state())],
        "handlers": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Interrupting:
    """Sends SIGINT at one instant, counted in lines of the guard's own code."""

    def __init__(self, at):
        self.at = at
        self.count = 0

    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(WATCHED):
            return None
        self.count += 1
        if self.count == self.at:
            signal.raise_signal(signal.SIGINT)
        return self

    def during(self, action):
        sys.settrace(self)
        try:
            action()
        finally:
            sys.settrace(None)


@pytest.fixture
def restless():
    torch.manual_seed(0)
    module = Restless()
    batch = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])
    loss(module, batch).backward()
    then = take_snapshot(module)
    with torch.no_grad():
        module.net[0].weight.add_(1)
    objective = Objective(module, [batch], loss)
    context = objective.context

    def evaluate():
        with weights_at(module, then):
            objective.evaluate(batch, context=context, use=lambda value: value.backward())

    return module, evaluate


@pytest.fixture
def _python_handler():
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, kept)


@pytest.mark.usefixtures("_python_handler")
def test_an_interrupt_at_any_instant_leaves_no_trace_and_is_not_lost(restless):
    module, evaluate = restless
    before = state_of(module)
    evaluate()  # what is found out once about a class takes lines of its own
    trial = Interrupting(0)
    trial.during(evaluate)
    total = trial.count
    assert total > 1000
    # One hundred instants over the whole, a prime step apart.
    step = max(1, total // 100) | 1
    for at in range(1, total, step):
        interrupting = Interrupting(at)
        with pytest.raises(KeyboardInterrupt):
            interrupting.during(evaluate)
        after = state_of(module)
        assert [k for k in before if not same(before[k], after[k])] == [], at
    assert interrupts._held.depth == 0
    assert interrupts._held.waiting == []


@pytest.mark.usefixtures("_python_handler")
def test_the_users_own_code_is_interrupted_at_once():
    reached = []

    def step():
        signal.raise_signal(signal.SIGINT)
        reached.append(1)

    @shielded
    def restore():
        signal.raise_signal(signal.SIGINT)
        reached.append(2)

    with pytest.raises(KeyboardInterrupt), held_back():
        step()
    assert reached == []

    def both():
        with held_back():
            restore()
            reached.append(3)

    with pytest.raises(KeyboardInterrupt):
        both()
    # Delivered when nothing was held any more.
    assert reached == [2, 3]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_without_a_python_handler_is_left_alone():
    kept = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with held_back():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, kept)

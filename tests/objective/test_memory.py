"""What is kept in memory, and that the numbers do not depend on it."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lla_callbacks import measure_hessian
from lla_callbacks.linalg import heap, loss_operator
from lla_callbacks.linalg.errors import MeasurementError, OutOfMemoryError
from lla_callbacks.linalg.room import AT_WORK, PROCESS, basis_room
from lla_callbacks.objective import held_loss
from lla_callbacks.objective.batch_plan import BatchPlan
from lla_callbacks.objective.memory import (
    LEAST_MEMORY,
    Findings,
    MemoryPlan,
)
from lla_callbacks.objective.objective import Objective
from lla_callbacks.objective.state import preserved

MIB = 2**20


@pytest.mark.parametrize(
    ("saved", "allowed", "kept", "parts"),
    [
        # All graphs fit: three times what their forward passes save.
        ([10, 10], 60, 2, 1),
        # One is kept beside the one that is being differentiated.
        ([10, 10], 59, 0, 1),
        ([10, 10, 10, 10], 61, 1, 1),
        # Not even one fits: parts of a batch.
        ([10, 10], 29, 0, 2),
        ([10, 10], 8, 0, 4),
        ([10], 30, 1, 1),
        ([10], 10, 0, 4),
    ],
)
def test_the_plan_keeps_what_fits(saved, allowed, kept, parts):
    plan = MemoryPlan.of([s * MIB for s in saved], [8] * len(saved), 0, allowed * MIB)
    assert (plan.num_kept, plan.parts, plan.part_size) == (kept, parts, 8 // parts)


def test_by_default_half_of_a_training_step_and_a_little_more():
    small = MemoryPlan.of([LEAST_MEMORY / 3], [8], 0, None)
    assert small.parts == 1
    # Four copies of the weights and what one batch saves: half of it are 3 GiB.
    large = MemoryPlan.of([2 * 2**30], [8], 2**30, None)
    assert large.parts == 2


def problem(norm=False):
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(32) if norm else nn.Identity()
    net = nn.Sequential(nn.Linear(8, 32), middle, nn.Tanh(), nn.Linear(32, 3)).double()
    x, y = torch.randn(64, 8, dtype=torch.float64), torch.randint(3, (64,))
    return net, [(x[:40], y[:40]), (x[40:], y[40:])]


def loss(module, batch):
    return cross_entropy(module(batch[0]), batch[1])


@pytest.mark.parametrize("max_memory", [20_000, 60_000, 10**9])
def test_the_numbers_do_not_depend_on_the_memory(max_memory):
    net, batches = problem()
    wanted = measure_hessian(net, batches, loss=loss)
    sizes = []

    def noted(module, batch):
        sizes.append(len(batch[0]))
        return loss(module, batch)

    found = measure_hessian(net, batches, loss=noted, max_memory=max_memory)
    assert found.engine == "exact"
    assert float(found.lambda_max) == pytest.approx(float(wanted.lambda_max), rel=1e-12)
    assert found.trace == pytest.approx(wanted.trace, rel=1e-10)
    if max_memory == 20_000:
        assert min(sizes) <= 10


def test_what_cannot_be_split_goes_by_difference_and_says_why():
    net, batches = problem(norm=True)
    found = measure_hessian(net, batches, loss=loss, max_memory=20_000)
    assert found.engine == "difference"
    assert "max_memory=20000" in found.engine_reason
    wanted = measure_hessian(net, batches, loss=loss)
    assert found.trace == pytest.approx(wanted.trace, rel=1e-5)
    with pytest.raises(OutOfMemoryError, match=r"max_memory=20000.*engine='difference'"):
        measure_hessian(net, batches, loss=loss, max_memory=20_000, engine="exact")


def token_loss(module, batch):
    """A mean over tokens, which is one over samples only while none is padded."""
    return cross_entropy(module(batch[0]).transpose(1, 2), batch[1], ignore_index=-100)


def padded_problem(pad):
    """Two batches of sequences, the second one padded to unequal lengths."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    batches = [(torch.randn(24, 6, 4).double(), torch.randint(3, (24, 6))) for _ in range(2)]
    if pad:
        batches[1][1][:12, 1:] = -100
    return net, batches


def test_each_batch_that_is_split_is_verified_and_refused_by_name():
    net, batches = padded_problem(pad=True)
    settings = {"loss": token_loss, "num_steps": 6, "num_probes": 4}
    wanted = measure_hessian(net, batches, **settings)
    with pytest.raises(MeasurementError, match=r"the loss of batch 2 of 2 .*mean over tokens"):
        measure_hessian(net, batches, microbatch_size=6, **settings)
    # The first batch is its parts' mean, and decided for all.
    with pytest.raises(OutOfMemoryError, match="a batch of 24 samples cannot be split"):
        measure_hessian(net, batches, max_memory=9_000, engine="exact", **settings)
    found = measure_hessian(net, batches, max_memory=9_000, **settings)
    assert "cannot be split" in found.engine_reason
    assert found.trace == pytest.approx(wanted.trace, rel=1e-5)


def test_whole_sequences_are_split_and_give_the_same_numbers():
    net, batches = padded_problem(pad=False)
    settings = {"loss": token_loss, "num_steps": 6, "num_probes": 4}
    wanted = measure_hessian(net, batches, **settings)
    for change in ({"microbatch_size": 6}, {"max_memory": 9_000}):
        found = measure_hessian(net, batches, **change, **settings)
        assert found.engine == "exact"
        assert found.trace == pytest.approx(wanted.trace, rel=1e-10)


def test_a_gradient_is_compared_once_a_batch_and_its_loss_at_every_measurement():
    net, batches = padded_problem(pad=True)
    with torch.no_grad():
        # All tokens are equally likely at first, so that the mean is the same however it is taken.
        net[2].weight.zero_()
        net[2].bias.zero_()
    objective = Objective(net, batches, token_loss)
    assert objective() == pytest.approx(math.log(3))
    with pytest.raises(MeasurementError, match="batch 2 of 2"):
        Objective(net, batches, token_loss, microbatch_size=6)
    findings = Findings()
    Objective(net, batches[:1], token_loss, microbatch_size=6, findings=findings)
    assert findings.split == {0}


def test_a_batch_that_runs_out_of_memory_is_halved():
    net, batches = problem()
    wanted = measure_hessian(net, batches, loss=loss)

    def greedy(module, batch):
        if len(batch[0]) > 12 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(module, batch)

    found = measure_hessian(net, batches, loss=greedy)
    assert found.trace == pytest.approx(wanted.trace, rel=1e-10)


def test_vectors_that_do_not_fit_on_the_device_live_on_the_cpu():
    net, batches = problem()
    hessian = Objective(net, batches, loss, max_memory=10**6).hessian()
    assert hessian.room == 10**6
    # As on a GPU, whose tensors this machine cannot have.
    hessian.device = torch.device("cuda")
    few = 10**6 // (8 * hessian.shape[0])
    assert hessian.basis_device(few).type == "cuda"
    assert hessian.basis_device(few + 1).type == "cpu"


def float_problem():
    net, batches = problem()
    return net.float(), [(x.float(), y) for x, y in batches]


@pytest.mark.parametrize(
    ("vectors", "settings", "steps", "half"),
    [
        (60, {}, 24, False),
        # Twelve vectors' worth: as many in half of the memory.
        (12.5, {}, 24, True),
        (8.5, {}, 17, True),
        # No fewer than ten, and what was asked for is done as told.
        (1, {}, 10, True),
        (1, {"num_steps": 20}, 20, True),
        (-9, {"num_runs": 2}, 10, True),
    ],
)
def test_a_basis_is_kept_in_half_and_then_shortened(monkeypatch, vectors, settings, steps, half):
    monkeypatch.setattr(loss_operator, "LEAST_BASIS", 0)
    net, batches = float_problem()
    count = sum(p.numel() for p in net.parameters())
    monkeypatch.setattr(BatchPlan, "basis_room", lambda self, engine: 4 * count * vectors)
    found = measure_hessian(net, batches, loss=loss, **settings)
    assert found.num_steps == steps
    notes = " ".join(found.notes)
    assert ("basis vectors in float16" in notes) == half
    assert (f"{steps} Lanczos steps in place of 24" in notes) == (
        steps < 24 and "num_steps" not in settings
    )
    dense = measure_hessian(net.double(), [(x.double(), y) for x, y in batches], loss=loss)
    for name in ("lambda_max", "lambda_min"):
        value, exact = getattr(found, name), getattr(dense, name)
        assert abs(value - exact) <= value.beyond
    assert abs(found.trace - dense.trace) <= 3 * math.hypot(found.trace_sem, dense.trace_sem)


def test_what_a_basis_may_take():
    gib = 2**30
    # Adam on a GiB of weights: five GiB and a third in all. Half as much again, less what stays.
    exact = AT_WORK["exact"]
    room = basis_room(0, 0, gib, None)
    peak = PROCESS + 6 * gib
    assert room == pytest.approx(1.5 * peak - (PROCESS + 4 * gib) - exact * gib)
    assert basis_room(0, gib, gib, None) == room - gib
    assert basis_room(0, 0, gib, 8 * gib) == (8 - exact) * gib
    differing = basis_room(0, 0, gib, 8 * gib, "difference")
    assert differing == (8 - AT_WORK["difference"]) * gib


@pytest.mark.parametrize("allowed", [1, 10**9])
def test_a_graph_that_is_not_kept_is_taken_down_as_it_is_walked(monkeypatch, allowed):
    net, batches = problem(norm=True)
    noted = []
    grad = torch.autograd.grad

    def noting(*args, **settings):
        if "is_grads_batched" in settings:
            noted.append(settings["retain_graph"])
        return grad(*args, **settings)

    hessian = Objective(net, batches, loss, max_memory=allowed, engine="exact")
    if allowed == 1:
        monkeypatch.setattr(
            BatchPlan, "_memory_plan", lambda self, counts: MemoryPlan(0, 1, 64, 1.0)
        )
    operator = hessian.hessian()
    monkeypatch.setattr(torch.autograd, "grad", noting)
    products = [operator @ torch.ones(operator.shape[0]).double() for _ in range(2)]
    # A mode of torch functions calls again what it lets through.
    assert set(noted) - {None} == {allowed > 1}
    torch.testing.assert_close(*products)
    wanted = Objective(net, batches, loss).hessian() @ torch.ones(operator.shape[0]).double()
    torch.testing.assert_close(products[0], wanted)


def test_a_graph_of_the_users_own_is_left_standing(monkeypatch):
    net, batches = problem()
    monkeypatch.setattr(BatchPlan, "_memory_plan", lambda self, counts: MemoryPlan(0, 1, 64, 1.0))
    # Made once, and walked by the user's training later.
    scale = net[0].weight.exp().mean()
    objective = Objective(
        net, batches, lambda m, b: scale * loss(m, b), engine="exact", check=False
    )
    hessian = objective.hessian()
    for _ in range(2):
        assert bool((hessian @ torch.ones(hessian.shape[0]).double()).isfinite().all())
    scale.backward()
    assert net[0].weight.grad is not None


def penalized(module, batch):
    """A loss with a transform inside, which refuses hooks on what is saved."""
    slope = torch.func.grad(lambda x: module(x).square().sum())(batch[0])
    return loss(module, batch) + slope.square().mean()


@pytest.mark.parametrize(("function", "trims"), [(loss, True), (penalized, False)])
def test_what_is_free_is_given_back_while_large_graphs_are_made(monkeypatch, function, trims):
    net, batches = problem()
    vector = torch.ones(sum(p.numel() for p in net.parameters())).double()
    calls = []
    monkeypatch.setattr(heap, "trimmer", lambda: calls.append)
    monkeypatch.setattr(heap, "STEP", 0)
    wanted = Objective(net, batches, function).hessian() @ vector
    # Kept graphs are small enough.
    assert calls == []
    monkeypatch.setattr(BatchPlan, "_memory_plan", lambda self, counts: MemoryPlan(0, 1, 64, 1.0))
    hessian = Objective(net, batches, function).hessian()
    made = len(calls)
    torch.testing.assert_close(hessian @ vector, wanted)
    # Once when they are made and once when they are walked, at least.
    assert (len(calls) > made > 0) == trims


@pytest.mark.parametrize("engine", ["exact", "difference"])
def test_a_gradient_that_was_put_aside_comes_back_to_the_bit(engine):
    net, batches = problem()
    hessian = Objective(net, batches, loss, engine=engine).hessian()
    known = hessian.gradient
    vector = torch.linspace(-1, 1, hessian.shape[0]).double()
    product = hessian @ vector
    hessian.save_memory()
    assert torch.equal(hessian.gradient, known)
    assert hessian.gradient.data_ptr() != known.data_ptr()
    # Differences are then taken out of one another at once.
    torch.testing.assert_close(hessian @ vector, product, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("some", [None, ["0.weight"]])
def test_weights_that_differences_move_are_kept_once(monkeypatch, some):
    net, batches = problem()
    hessian = Objective(net, batches, loss, engine="difference", parameters=some).hessian()
    before = [p.detach().clone() for p in net.parameters()]
    asked = []

    def noting(module, **settings):
        asked.append(settings["check_weights"])
        return preserved(module, **settings)

    monkeypatch.setattr(held_loss, "preserved", noting)
    hessian @ torch.ones(hessian.shape[0]).double()
    # Where only some are moved, the others are kept by nobody else.
    assert set(asked) == {some is not None}
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    hessian.save_memory()
    asked.clear()
    assert bool(hessian.gradient.isfinite().all())
    assert set(asked) == {True}

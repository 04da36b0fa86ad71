"""FSDP2's MixedPrecisionPolicy has no effect on a measurement, and is back to the bit after it."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lla_callbacks import loss_line, measure_hessian
from lla_callbacks.objective import policy
from lla_callbacks.objective.policy import policy_dtype, put_aside
from lla_callbacks.objective.precision import at_precision

pytestmark = pytest.mark.skipif(
    not hasattr(torch.cpu.current_stream(), "record_event"),
    reason="fully_shard does not run on CPUs with this release of torch",
)
HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
CASTING = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)
# Of a parameter, as torch has it between two passes.
OF_PARAMETERS = ("mp_policy", "param_dtype", "reduce_dtype", "orig_dtype", "all_gather_outputs",
                 "_unsharded_param", "unsharded_accumulated_grad")  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    """One process is a group too."""
    store = tmp_path_factory.mktemp("store") / "file"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
        self.trouble = False

    def forward(self, x):
        if self.trouble:
            self.net[0](x)
            raise RuntimeError("the network is unwell")
        return self.net(x)


def sharded(how=HALF):
    module = Net()
    fully_shard(module.net[0], mp_policy=replace(how, output_dtype=None))
    fully_shard(module, mp_policy=how)
    return module


def batch():
    torch.manual_seed(3)
    return torch.randn(8, 3), torch.randn(8, 2)


def loss(module, batch):
    return (module(batch[0]).float() - batch[1]).square().mean()


def states(module):
    return [module.net[0]._get_fsdp_state(), module._get_fsdp_state()]


def kept(module):
    """Return whatever a measurement might leave behind, by identity where it is an object."""
    found = []
    for state in states(module):
        found += [id(state._mp_policy), state._training_state]
        for each in state._fsdp_param_groups:
            found += [id(each.mp_policy), each._orig_dtype, each._reduce_dtype, each.is_sharded]
            for p in each.fsdp_params:
                own = [vars(p).get(name) for name in OF_PARAMETERS]
                found += [v if isinstance(v, torch.dtype) else id(v) for v in own]
                # Not yet summed over processes.
                waiting = p.unsharded_accumulated_grad
                waiting = p._unsharded_param.grad if waiting is None else waiting
                found.append((waiting.dtype, float(waiting.double().sum())))
    return found


def micro_batch(module):
    """Leave gradients that are not yet summed over processes, as between two micro-batches."""
    module.set_requires_gradient_sync(False)
    loss(module, batch()).backward()
    module.set_requires_gradient_sync(True)
    return module


def assert_trains_alike(module, twin):
    for each in (module, twin):
        loss(each, batch()).backward()
    for one, other in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad.full_tensor(), other.grad.full_tensor())


@pytest.mark.parametrize("how", [HALF, CASTING])
def test_numbers_are_those_of_float32_and_all_of_it_is_back(how):
    module, twin, bare = sharded(how), sharded(how), Net()
    plain = measure_hessian(bare, [batch()], loss=loss, engine="difference", num_steps=4)
    # Before its first pass, and in the middle of a step.
    for _ in range(2):
        report = measure_hessian(module, [batch()], loss=loss, num_steps=4)
        assert (report.precision, report.gaps) == ("float32", {})
        assert report.loss == plain.loss
        assert report.trace == pytest.approx(plain.trace, rel=1e-3)
        assert float(report.lambda_max) == pytest.approx(float(plain.lambda_max), rel=1e-3)
        for each in (module, twin):
            micro_batch(each)
        before = kept(module)
    measure_hessian(module, [batch()], loss=loss, num_steps=4)
    assert kept(module) == before
    assert_trains_alike(module, twin)


def test_whatever_is_raised_inside_a_pass_the_next_one_is_training_s():
    module, twin = micro_batch(sharded()), micro_batch(sharded())
    module.trouble = True
    before = kept(module)
    with pytest.raises(RuntimeError, match="unwell"):
        measure_hessian(module, [batch()], loss=loss)
    module.trouble = False
    assert kept(module) == before
    assert_trains_alike(module, twin)


@pytest.mark.parametrize("way", ["asked for", "unknown"])
def test_where_the_policy_stays_results_say_so(way, monkeypatch):
    """Asked for by precision='training', or in a release of torch whose names differ."""
    if way == "unknown":
        monkeypatch.setattr(policy, "_OF_GROUPS", (*policy._OF_GROUPS, "not there"))
    module = sharded()
    precision = "training" if way == "asked for" else "float32"
    report = measure_hessian(module, [batch()], loss=loss, num_steps=4, precision=precision)
    assert report.precision == "bfloat16 MixedPrecisionPolicy"
    assert "too few digits" in report.gaps["trace"]
    line = loss_line(module, [batch()], loss=loss, alphas=[-1.0, 0.0, 1.0])
    assert line.facts.precision == "bfloat16"
    assert policy_dtype(Net()) is None
    assert policy_dtype(sharded(MixedPrecisionPolicy(output_dtype=torch.float32))) is None


def test_float64_weights_stay_float64():
    module = Net().double()
    fully_shard(module, mp_policy=CASTING)
    with at_precision(module, "float32"):
        assert policy_dtype(module) is None
        assert module(batch()[0].double()).dtype == torch.float64
        # Nested, as evaluations are.
        with put_aside(module, full=True):
            assert module(batch()[0].double()).dtype == torch.float64
    assert module(batch()[0].double()).dtype == torch.float32

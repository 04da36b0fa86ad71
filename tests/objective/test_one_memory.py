"""Buffers that are views of each other stay so; weights in another's memory are refused."""

import time

import pytest
import torch
from torch import nn

from lla_callbacks import interpolate, measure_hessian
from lla_callbacks.linalg.errors import MeasurementError
from lla_callbacks.objective.one_memory import refuse_shared_memory
from tests.kinds import dense_by_differences, tanh_net, vectors


class Bank(nn.Module):
    """Writes its bank, and reads a part of it by another name."""

    def __init__(self):
        super().__init__()
        self.net = tanh_net().double()
        self.register_buffer("bank", torch.zeros(6, dtype=torch.float64))
        self.register_buffer("head", self.bank[:4])

    def forward(self, x):
        self.bank.add_(0.5)
        return self.net(x + self.head)


def loss(module, batch):
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def test_views_of_a_buffer_see_what_is_written_to_it():
    torch.manual_seed(0)
    module, batch = Bank(), vectors()
    report = measure_hessian(module, [batch], loss=loss, num_steps=40, num_probes=40)
    plain = [(batch[0] + 0.5, batch[1])]
    dense = dense_by_differences(module.net, plain, loss, "batch")
    assert float(report.lambda_max) == pytest.approx(
        float(torch.linalg.eigvalsh(dense)[-1]), abs=1e-6
    )
    state = {k: v.clone() for k, v in module.state_dict().items()}
    line = interpolate(module, [batch], state, state, loss=loss, alphas=[0.0, 0.5, 1.0])
    assert line.loss.tolist() == pytest.approx(3 * [loss(module.net, plain[0]).item()], rel=1e-12)
    assert float(module.bank.sum()) == 0.0


def first_weights():
    module = tanh_net()
    module.register_buffer("start", module[0].weight.detach())
    return module


def frozen_twin():
    module = tanh_net()
    module.twin = nn.Parameter(module[2].weight.data[1:], requires_grad=False)
    return module


@pytest.mark.parametrize(
    ("make", "names"),
    [(first_weights, "0.weight and start"), (frozen_twin, "2.weight and twin")],
)
def test_a_trained_weight_in_anothers_memory_is_refused_by_name(make, names):
    with pytest.raises(MeasurementError, match=rf"{names} lie in one memory.*clone\(\)"):
        measure_hessian(make(), [vectors()], loss=loss)


def test_parts_of_one_memory_beside_each_other_are_no_trouble():
    module, flat = nn.Linear(3, 2), torch.randn(8)
    module.weight.data, module.bias.data = flat[:6].view(2, 3), flat[6:]
    refuse_shared_memory(module)
    module.register_buffer("mask", torch.zeros(2))
    module.register_buffer("part", module.mask[:1])
    refuse_shared_memory(module)
    # A buffer between two others that overlap: neither is trained.
    module.register_buffer("whole", module.mask)
    refuse_shared_memory(module)


def test_many_weights_in_one_memory_are_looked_at_once_each():
    module, flat = nn.Module(), torch.zeros(10_000)
    for i, part in enumerate(flat.split(1)):
        module.register_parameter(f"p{i}", nn.Parameter(part))
    began = time.process_time()
    refuse_shared_memory(module)
    assert time.process_time() - began < 1.0
    module.p7.data = flat[5:7]
    with pytest.raises(MeasurementError, match="p5 and p7 lie in one memory"):
        refuse_shared_memory(module)

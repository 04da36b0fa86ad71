"""Hooks that torch calls for every module there is are as they were, and part of the loss."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.modules import module as of_torch

from lla_callbacks import loss_line, measure_hessian
from tests.kinds import tanh_net, vectors


def loss(module, batch):
    return cross_entropy(module(batch[0]), batch[1])


@pytest.mark.parametrize("evaluation", ["loop", "auto"])
def test_what_they_keep_is_kept_and_they_count_in_the_loss(evaluation):
    torch.manual_seed(0)
    module, batch = tanh_net().double(), vectors()
    calls, seen, last = [], [], [0]

    def grow(layer, given, found):
        if not isinstance(layer, nn.Tanh):
            return None
        calls.append(1)
        return found * (1 + 0.1 * len(calls))

    def look(layer, given):
        last[0] += 1

    handles = [
        of_torch.register_module_forward_hook(grow),
        of_torch.register_module_forward_pre_hook(look),
        of_torch.register_module_full_backward_hook(lambda m, i, o: seen.append(1)),
        of_torch.register_module_full_backward_pre_hook(lambda m, o: seen.append(1)),
    ]
    try:
        line = loss_line(
            module, [batch], loss=loss, directions="random", alphas=[-0.1, 0.0, 0.1],
            evaluation=evaluation,
        )  # fmt: skip
        report = measure_hessian(module, [batch], loss=loss, num_steps=4, num_probes=2)
        assert (calls, seen, last) == ([], [], [0])
        # Each pass is as the next one of training would be.
        alone = loss(module, batch).item()
        assert (len(calls), last) == (1, [4])
    finally:
        for handle in handles:
            handle.remove()
    assert float(line.loss[1]) == pytest.approx(alone, rel=1e-12)
    assert report.loss == pytest.approx(alone, rel=1e-12)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks_for_all_modules_that_a_step_registers_are_gone_with_it():
    def registering(module, batch):
        of_torch.register_module_forward_hook(lambda m, i, o: None)
        of_torch.register_module_full_backward_pre_hook(lambda m, o: None)
        return loss(module, batch)

    measure_hessian(
        tanh_net().double(), [vectors()], loss=registering, num_steps=2, num_probes=2, check=False
    )
    assert not of_torch._global_forward_hooks
    assert not of_torch._global_backward_pre_hooks

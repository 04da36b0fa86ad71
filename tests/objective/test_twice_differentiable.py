from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lla_callbacks.objective.twice_differentiable import twice_differentiable

NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm2d(4),
    "batch norm, no affine": lambda: nn.BatchNorm2d(4, affine=False),
    "batch norm, no running": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "instance norm": lambda: nn.InstanceNorm2d(4),
    "instance norm, running": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "layer norm": lambda: nn.LayerNorm([3, 3]),
    "layer norm, no bias": lambda: nn.LayerNorm(3, bias=False),
    "layer norm, no affine": lambda: nn.LayerNorm(3, elementwise_affine=False),
}


def randomized(module: nn.Module) -> nn.Module:
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 2)
    return module.double()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_composed_norms_have_the_native_values_and_gradients(name: str, training: bool) -> None:
    module = randomized(NORMS[name]()).train(training)
    x = torch.randn(5, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    inputs = [x, *module.parameters()]
    # The module itself counts its batches; the running statistics are the function's.
    running = [b for b in module.buffers() if b.is_floating_point()]
    buffers = [b.clone() for b in running]
    with twice_differentiable(dropout=False):
        composed = module(x)
    # Running statistics are not touched by the composed form.
    assert all(torch.equal(a, b) for a, b in zip(running, buffers, strict=True))
    native = module(x)
    torch.testing.assert_close(composed, native)
    for a, b in zip(
        torch.autograd.grad(composed.pow(3).sum(), inputs),
        torch.autograd.grad(native.pow(3).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NORMS)
def test_composed_norms_have_right_third_derivatives(name: str) -> None:
    module = randomized(NORMS[name]())
    x = torch.randn(4, 4, 3, 3, dtype=torch.float64)
    v = torch.randn_like(x)

    def second(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        with twice_differentiable(dropout=False):
            loss = module(x).pow(3).sum()
            first = torch.autograd.grad(loss, x, create_graph=True)[0]
            return torch.autograd.grad((first * v).sum(), x, create_graph=True)[0], x

    quadratic, at = second(x)
    third = torch.autograd.grad((quadratic * v).sum(), at)[0]
    step = 1e-5
    difference = (second(x + step * v)[0] - second(x - step * v)[0]) / (2 * step)
    # The third derivative is symmetric: along v twice, its gradient is its action on v.
    torch.testing.assert_close(third, difference.detach(), atol=1e-5, rtol=1e-5)


def test_one_value_a_channel_is_refused_as_natively() -> None:
    module, x = nn.BatchNorm1d(3), torch.randn(1, 3)
    with twice_differentiable(dropout=False), pytest.raises(ValueError, match="several values"):
        module(x)


DROPOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "module": nn.Dropout(0.5),
    "2d": nn.Dropout2d(0.5),
    "alpha": nn.AlphaDropout(0.5),
    "functional": lambda x: F.dropout(x, 0.5, True),
    "torch": lambda x: torch.dropout(x, 0.5, True),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, None, 0.5),
    "attention by name": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_is_off_unless_asked_for(name: str) -> None:
    x = torch.randn(2, 4, 6, 6)
    function = DROPOUTS[name]
    with twice_differentiable(dropout=False):
        torch.manual_seed(0)
        first = function(x)
        torch.manual_seed(1)
        assert torch.equal(first, function(x))
    with twice_differentiable(dropout=True):
        torch.manual_seed(0)
        first = function(x)
        torch.manual_seed(1)
        assert not torch.equal(first, function(x))


def test_multi_head_attention_drops_nothing() -> None:
    module, x = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True), torch.randn(2, 3, 4)
    with twice_differentiable(dropout=False):
        first = module(x, x, x)[0]
        second = module(x, x, x)[0]
    assert torch.equal(first, second)
    torch.testing.assert_close(first, module.eval()(x, x, x)[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_do_without_cudnn(kind: type[nn.Module]) -> None:
    seen: list[bool] = []

    class Looking(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func in (torch.lstm, torch.gru, torch.rnn_tanh):
                seen.append(torch.backends.cudnn.enabled)
            return func(*args, **(kwargs or {}))

    # The outer mode sees what the inner one makes of a call.
    with Looking(), twice_differentiable(dropout=False):
        kind(4, 3)(torch.randn(2, 3, 4))
    assert seen == [False]
    assert torch.backends.cudnn.enabled


@pytest.mark.parametrize("name", ["batch norm", "instance norm"])
def test_the_graph_of_a_norms_gradient_keeps_two_tensors_of_its_size(name: str) -> None:
    module, x = NORMS[name](), torch.randn(64, 4, 3, 3, requires_grad=True)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        with twice_differentiable(dropout=False):
            # A gradient that is not known beforehand, as that of what follows.
            value = module(x)
        direction = torch.ones_like(value, requires_grad=True)
        torch.autograd.grad(value, x, direction, create_graph=True)
    # The centred values and the gradient; torch.var_mean in their place makes it five.
    assert sum(size == 4 * x.numel() for size in kept.values()) == 2

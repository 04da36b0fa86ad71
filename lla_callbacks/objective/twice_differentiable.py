"""Make any module's forward pass cheap and right to differentiate twice, untouched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lla_callbacks.objective.checkpoints import no_checkpoints
from lla_callbacks.objective.function_modes import FunctionMode
from lla_callbacks.objective.gradient_hooks import register_nothing


@contextmanager
def twice_differentiable(*, dropout: bool) -> Iterator[None]:
    """Within this context, forward passes use forms that differentiate twice.

    * Batch, layer and instance normalization are composed of elementary operations:
      torch's own double-backward formulas are slow (a product on a ResNet-20 took 1.4
      times as long in eval mode and twice as long in batch mode) and their third
      derivatives are wrong (pytorch issue 186256).
    * Weight norm likewise: the second derivative of torch's own is wrong
      (``torch.autograd.gradgradcheck`` fails on it in 2.13).
    * Embeddings give dense gradients, and unscaled ones: those that ``scale_grad_by_freq``
      gives are no derivative of the loss.
    * Recurrent layers on GPUs do without cuDNN, which has no second derivative of them.
    * Hooks that a forward pass puts on its tensors' gradients are not called.
    * Checkpoints keep their activations; see
      :func:`~lla_callbacks.objective.checkpoints.no_checkpoints`.
    * Attention uses the math kernel; the fused ones have no second derivative.
    * Compiled modules run eagerly: compiled backward passes cannot be differentiated.
    * Dropout does nothing, unless ``dropout`` asks for it.

    The values agree with the native forms to rounding. Running statistics are not
    updated.
    """
    substitutes = _NORMALIZATIONS | _GRADIENTS | _RECURRENT | ({} if dropout else _NO_DROPOUT)
    with sdpa_kernel(SDPBackend.MATH), eager(), no_checkpoints(), _Substitution(substitutes):
        yield


@contextmanager
def once_differentiable(
    *, dropout: bool, hooks: bool = False, on_hook: Callable[[], object] | None = None
) -> Iterator[None]:
    """Within this context, forward passes use torch's own kernels, as training does.

    Attention stays fused and activation checkpoints keep saving memory, but for the reentrant
    form, which refuses ``torch.autograd.grad``. Dropout does nothing, unless ``dropout`` asks
    for it. Compiled modules run eagerly: the guard of their state would make them compile anew,
    and training with them. Embeddings have dense gradients.

    Args:
        dropout: Whether dropout stays as it is.
        hooks: Whether forward passes may register hooks on tensors, as sharded modules must.
        on_hook: Called where one is left out.
    """
    substitutes = {} if dropout else dict(_NO_DROPOUT)
    substitutes |= _GRADIENTS
    if hooks:
        del substitutes[Tensor.register_hook]
    elif on_hook is not None:
        substitutes[Tensor.register_hook] = _noting(on_hook)
    with eager(), no_checkpoints(reentrant_only=True), _Substitution(substitutes):
        yield


class NoDropout(FunctionMode):
    """Within this context functional dropout does nothing, also where it is hard-wired.

    Attributes:
        active: Whether any dropout would have done something so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active = False

    def called(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return what a call returns."""
        substitute = _NO_DROPOUT.get(func)
        if substitute is None:
            return func(*args, **kwargs)
        self.active = self.active or _is_on(func, args, kwargs)
        return substitute(*args, **kwargs)


def elementary_normalization(
    others: Mapping[Callable[..., Any], Callable[..., Any]] | None = None,
) -> AbstractContextManager[object]:
    """Return the context in which normalization is composed of elementary operations.

    Its running statistics are not written, which vmap could not do.

    Args:
        others: Further functions, and what is called in their places.
    """
    return _Substitution({**_NORMALIZATIONS, **(others or {})})


def eager() -> AbstractContextManager[object]:
    """Return the context in which compiled modules run eagerly."""
    # set_stance came with torch 2.6.
    stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if stance is None else stance("force_eager")


class _Substitution(FunctionMode):
    def __init__(self, substitutes: Mapping[Callable[..., Any], Callable[..., Any]]) -> None:
        super().__init__()
        self._substitutes = substitutes

    def called(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return what a call returns."""
        return self._substitutes.get(func, func)(*args, **kwargs)


def _moments(x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    """Return ``x`` less its mean over some dimensions, and its variance over them.

    By sums, and a product of the centred values with themselves: these values are all that the
    graph keeps, once, forwards and backwards. ``torch.var_mean`` keeps ``x`` too and, in the graph
    of the gradient, the centred values again.
    """
    if x.dtype in (torch.float16, torch.bfloat16):
        # Their sums overflow, or lose digits.
        var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
        return x - mean, var
    count = math.prod(x.shape[d] for d in dims)
    centred = x - x.sum(dims, keepdim=True) / count
    return centred, (centred * centred).sum(dims, keepdim=True) / count


def _normalize(
    centred: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Return ``centred / sqrt(var + eps) * weight + bias``, everything broadcastable."""
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    # Not torch.addcmul, whose second derivative keeps a copy of the centred values.
    scaled = centred * scale
    return scaled if bias is None else scaled + bias


def _per_channel(tensor: Tensor | None, ndim: int) -> Tensor | None:
    return None if tensor is None else tensor.reshape(1, -1, *[1] * (ndim - 2))


def _by_running(x: Tensor, mean: Tensor | None, var: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return ``x`` less its running mean, and the running variance."""
    assert mean is not None
    assert var is not None
    mean, var = (t.reshape(1, -1, *[1] * (x.ndim - 2)) for t in (mean, var))
    return x - mean, var


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training:
        if input.numel() == input.shape[1]:
            # The native form refuses this too: one value has no variance.
            raise ValueError(f"batch statistics need several values per channel: {input.shape}")
        centred, var = _moments(input, [0, *range(2, input.ndim)])
    else:
        centred, var = _by_running(input, running_mean, running_var)
    weight, bias = (_per_channel(t, input.ndim) for t in (weight, bias))
    return _normalize(centred, var, weight, bias, eps)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    centred, var = _moments(input, list(range(-len(normalized_shape), 0)))
    return _normalize(centred, var, weight, bias, eps)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if use_input_stats:
        centred, var = _moments(input, list(range(2, input.ndim)))
    else:
        centred, var = _by_running(input, running_mean, running_var)
    weight, bias = (_per_channel(t, input.ndim) for t in (weight, bias))
    return _normalize(centred, var, weight, bias, eps)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    # dim=-1 is torch's word for one norm of the whole tensor.
    dims = [i for i in range(v.ndim) if i != dim or dim == -1]
    norm = torch.linalg.vector_norm(v, dim=dims, keepdim=dim != -1) if dims else v.abs()
    return v * (g / norm)


def _without_cudnn(function: Callable[..., Any]) -> Callable[..., Any]:
    def plain(*args: Any, **kwargs: Any) -> Any:
        # Here alone, since convolutions have one. The backward pass follows the forward pass.
        with torch.backends.cudnn.flags(enabled=False):
            return function(*args, **kwargs)

    return plain


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    return F.embedding(input, weight, padding_idx, max_norm, norm_type)


def _noting(on_hook: Callable[[], object]) -> Callable[..., Any]:
    def register(tensor: Tensor, hook: Any) -> Any:
        on_hook()
        return register_nothing(tensor, hook)

    return register


def _identity(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return input


def _attention(*args: Any, **kwargs: Any) -> Any:
    """``scaled_dot_product_attention`` without its dropout (the fifth argument)."""
    args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
    return F.scaled_dot_product_attention(*args, **{**kwargs, **_zero(kwargs, "dropout_p")})


def _multi_head_attention(*args: Any, **kwargs: Any) -> Any:
    """``multi_head_attention_forward`` without its dropout (the eleventh argument)."""
    args = (*args[:10], 0.0, *args[11:]) if len(args) > 10 else args
    return F.multi_head_attention_forward(*args, **{**kwargs, **_zero(kwargs, "dropout_p")})


def _is_on(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a dropout function would drop anything."""
    name, position = _SWITCHES.get(func, ("training", 2))
    # The functions of torch.nn.functional train by default.
    return bool(kwargs.get(name, args[position] if len(args) > position else position == 2))


def _zero(kwargs: dict[str, Any], name: str) -> dict[str, float]:
    return {name: 0.0} if name in kwargs else {}


_NORMALIZATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.instance_norm: _instance_norm,
    torch.batch_norm: lambda i, w, b, m, v, training, momentum, eps, cudnn: _batch_norm(
        i, m, v, w, b, training, momentum, eps
    ),
    torch.layer_norm: lambda i, shape, w=None, b=None, eps=1e-5, cudnn_enable=True: _layer_norm(
        i, shape, w, b, eps
    ),
    torch._weight_norm: _weight_norm,
}
_GRADIENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.embedding: _embedding,
    torch.embedding: lambda weight, indices, padding_idx=-1, *_, **__: torch.embedding(
        weight, indices, padding_idx
    ),
    Tensor.register_hook: register_nothing,
}
_RECURRENT: dict[Callable[..., Any], Callable[..., Any]] = {
    f: _without_cudnn(f) for f in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
}
_NO_DROPOUT: dict[Callable[..., Any], Callable[..., Any]] = {
    **{
        function: _identity
        for function in (
            F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout,
            F.feature_alpha_dropout, torch.dropout, torch.dropout_, torch.alpha_dropout,
            torch.feature_dropout, torch.feature_alpha_dropout,
        )
    },
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
}  # fmt: skip
# Name and position of the argument that turns dropout on.
_SWITCHES: dict[Callable[..., Any], tuple[str, int]] = {
    F.scaled_dot_product_attention: ("dropout_p", 4),
    F.multi_head_attention_forward: ("dropout_p", 10),
    torch.dropout: ("train", 2),
    torch.dropout_: ("train", 2),
    torch.alpha_dropout: ("train", 2),
    torch.feature_dropout: ("train", 2),
    torch.feature_alpha_dropout: ("train", 2),
}

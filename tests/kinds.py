"""Modules of every kind that people train, each with a loss and batches, in float64.

The reference knows nothing of the package: central differences of the gradients that
``backward()`` leaves, which works for whatever can be trained at all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, rnn
from torch.utils.checkpoint import checkpoint

Loss = Callable[[Any, Any], Tensor]


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def classes(count: int = 3) -> Callable[[], Any]:
    """Sequences of three vectors of four numbers, and a class for each sequence."""
    return lambda: (double(6, 3, 4), torch.randint(0, count, (6,)))


def vectors() -> Any:
    return double(6, 4), torch.randint(0, 3, (6,))


def tokens() -> Any:
    return torch.randint(0, 5, (6, 4)), torch.randint(0, 3, (6,))


def images() -> Any:
    return double(4, 2, 4, 4), torch.randint(0, 3, (4,))


def cross_entropy(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


@dataclass(frozen=True)
class Kind:
    """One kind of module.

    Attributes:
        name: What it is called.
        make: Returns the module; it is converted to float64.
        batch: Returns one batch.
        loss: ``loss(module, batch)``.
        derivative: ``"exact"``: double backward gives its Hessian. ``"none"``: it has no
            second derivative and must be refused by name.
        mode: Normalization mode of the objective.
        says: What a refusal says.
        convert: Whether ``.double()`` is left to whoever builds it.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[], Any] = vectors
    loss: Loss = cross_entropy
    derivative: Literal["exact", "none"] = "exact"
    mode: str = "batch"
    says: str = ""
    convert: bool = True

    def build(self) -> tuple[nn.Module, list[Any], Loss]:
        torch.manual_seed(1)
        module = self.make()
        if self.convert:
            module = module.double()
        return module, [self.batch()], self.loss


# -- attention ------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    """Attention by the functional form, with whatever arguments."""

    def __init__(self, heads: int = 2, **arguments: Any) -> None:
        super().__init__()
        self.arguments = arguments
        self.heads = heads
        self.project = nn.Linear(4, 12)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = (
            part.reshape(n, length, self.heads, -1).transpose(1, 2)
            for part in self.project(x).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, **self.arguments)
        return self.head(mixed.transpose(1, 2).reshape(n, length, width).mean(1))


class MultiHead(nn.Module):
    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments = arguments
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[0, 2] = True
        mixed, _ = self.attention(x, x, x, key_padding_mask=padding, **self.arguments)
        return self.head(mixed.mean(1))


class Encoder(nn.Module):
    def __init__(self, *, padded: bool = False) -> None:
        super().__init__()
        self.padded = padded
        layer = nn.TransformerEncoderLayer(4, 2, 5, 0.3, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        padding = None
        if self.padded:
            padding = torch.zeros(x.shape[:2], dtype=torch.bool)
            padding[0, 2] = True
        mixed = self.encoder(x, src_key_padding_mask=padding)
        return self.head(mixed[:, :2].mean(1))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoderLayer(4, 2, 5, 0.3, activation="gelu", batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.head(self.decoder(x, x.flip(1), tgt_mask=causal, tgt_is_causal=True).mean(1))


def gpt2(attention: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=7, n_positions=4, n_embd=4, n_layer=1, n_head=2,
            attn_implementation=attention, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
        # From the usual start a network this small is nearly linear.
        for p in model.parameters():
            p.data.add_(torch.randn_like(p), alpha=0.3)
        return model

    return make


def sentences() -> Any:
    ids = torch.randint(0, 7, (3, 4))
    mask = torch.ones_like(ids)
    mask[0, 3] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}


def next_token(module: nn.Module, batch: Any) -> Tensor:
    # The model's own loss is computed in float32, too coarse for differences.
    scores = module(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return F.cross_entropy(scores.flatten(0, 1), batch["labels"][:, 1:].flatten())


# -- compilation and checkpoints ------------------------------------------------------------------


def tanh_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def compiled() -> nn.Module:
    return torch.compile(tanh_net().double(), backend="aot_eager")  # type: ignore[return-value]


def compiled_in_place() -> nn.Module:
    module = tanh_net().double()
    module.compile(backend="aot_eager")
    return module


def compiled_part() -> nn.Module:
    return nn.Sequential(
        torch.compile(tanh_net().double(), backend="aot_eager"), nn.Tanh(), nn.Linear(3, 3)
    ).double()


class CompiledFunction(nn.Module):
    """Calls a compiled function, not a compiled module."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tanh_net()
        self.after = torch.compile(lambda x: torch.sin(x) * x, backend="aot_eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.net(x))


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.first = nn.Linear(4, 4)
        self.part = nn.Sequential(nn.Tanh(), nn.Linear(4, 4), nn.Dropout(0.3), nn.Tanh())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.part, self.first(x), use_reentrant=self.use_reentrant)
        return self.head(hidden)


# -- recurrent ------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module], packed: bool = False, **settings: Any):
        super().__init__()
        self.packed = packed
        self.net = kind(4, 3, batch_first=True, **settings)
        width = settings.get("proj_size", 3) * (2 if settings.get("bidirectional") else 1)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            lengths = torch.tensor([3, 3, 2, 2, 1, 1])
            x = rnn.pack_padded_sequence(x, lengths, batch_first=True)  # type: ignore[assignment]
            return self.head(rnn.pad_packed_sequence(self.net(x)[0], batch_first=True)[0].sum(1))
        return self.head(self.net(x)[0][:, -1])


class Cell(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.cell = kind(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state[0] if isinstance(state, tuple) else state


# -- embeddings -----------------------------------------------------------------------------------


class Embedded(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3, **settings)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x)).sum(1))


class Bag(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(5, 3, mode=mode)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x)))


# -- parametrizations -----------------------------------------------------------------------------


def with_linear(change: Callable[[nn.Linear], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layer = nn.Linear(4, 4).double()
        with warnings.catch_warnings():
            # The old forms are deprecated and in wide use.
            warnings.simplefilter("ignore", FutureWarning)
            change(layer)
        for _ in range(5):
            # The singular vectors of spectral norm start from noise.
            layer(double(2, 4))
        return nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 3))

    return make


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.abs()


# -- functions of the user's own ------------------------------------------------------------------


class Cube(torch.autograd.Function):
    """Differentiable as often as one likes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class OnceCube(Cube):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return Cube.backward(ctx, gradient)


class KernelCube(Cube):
    """Fills a buffer, as kernels in another language do, where autograd does not look."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        with torch.no_grad():
            return Cube.backward(ctx, gradient)


@torch.library.custom_op("lla_tests::cube", mutates_args=(), schema="(Tensor x) -> Tensor")
def library_cube(x: Tensor) -> Tensor:
    return x**3


@torch.library.custom_op(
    "lla_tests::cube_backward", mutates_args=(), schema="(Tensor gradient, Tensor x) -> Tensor"
)
def library_cube_backward(gradient: Tensor, x: Tensor) -> Tensor:
    return 3 * x**2 * gradient


library_cube.register_autograd(
    lambda ctx, gradient: library_cube_backward(gradient, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


# As operators in C++ are registered: kernels by device, and a derivative of the first alone.
BARE = torch.library.Library("lla_tests_bare", "DEF")
BARE.define("cube(Tensor x) -> Tensor")
BARE.define("cube_backward(Tensor gradient, Tensor x) -> Tensor")
BARE.impl("cube", lambda x: torch.from_numpy(x.detach().numpy() ** 3), "CPU")
BARE.impl(
    "cube_backward",
    lambda gradient, x: torch.from_numpy(3 * x.detach().numpy() ** 2 * gradient.detach().numpy()),
    "CPU",
)


class BareCube(Cube):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        with warnings.catch_warnings():
            # That it has no derivative, which is what is tested.
            warnings.simplefilter("ignore", UserWarning)
            return torch.ops.lla_tests_bare.cube_backward(gradient, *ctx.saved_tensors)


BARE.impl("cube", BareCube.apply, "Autograd")


class DetachedCube(Cube):
    """Its derivative is right, the derivative of that is not."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0].detach() ** 2 * gradient


class Rounded(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class Blocking(torch.autograd.Function):
    """Lets no gradient through, and says so with zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient)


class Calling(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor], *, add: bool = False) -> None:
        super().__init__()
        self.function = function
        self.add = add
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.a(x))
        found = self.function(hidden)
        return self.b(hidden + found if self.add else found)


# -- other shapes of modules ----------------------------------------------------------------------


class Spectral(nn.Module):
    """Complex numbers in between."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.filter = nn.Parameter(torch.randn(3))
        self.b = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.fft.irfft(torch.fft.rfft(self.a(x)) * self.filter, n=4).tanh())


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.list = nn.ParameterList([torch.randn(4, 4), torch.randn(4)])
        self.dict = nn.ParameterDict({"w": torch.randn(4, 3), "b": torch.randn(3)})
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(x @ self.list[0] + self.list[1])
        return self.scale * (hidden @ self.dict["w"]) + self.dict["b"]


def lazy() -> nn.Module:
    module = nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(3))
    module(torch.randn(2, 4))
    return module


def hooked() -> nn.Module:
    module = tanh_net()
    module[0].register_forward_hook(lambda m, inputs, output: output * 1.5)
    module[2].register_forward_pre_hook(lambda m, inputs: (inputs[0].sin(),))
    return module


def scripted() -> nn.Module:
    module = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.4), nn.Tanh(), nn.Linear(5, 3)
    ).double()
    return torch.jit.script(module)  # type: ignore[no-any-return]


def traced() -> nn.Module:
    return torch.jit.trace(tanh_net().double(), double(6, 4))  # type: ignore[no-any-return]


class Branching(nn.Module):
    """Looks at values, as vmap and functional transforms could not."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tanh_net()

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        scale = round(out.mean().item(), 2)
        if out.sum() > 1e9:
            raise AssertionError
        index = [i for i in range(len(x)) if float(x[i].sum()) > -1e9]
        return out[index] * 2 + scale


def in_place() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 5), nn.ELU(inplace=True), nn.Linear(5, 5), nn.SiLU(inplace=True),
        nn.Dropout(0.2, inplace=True), nn.Linear(5, 3),
    )  # fmt: skip


def channels_last() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
    ).to(memory_format=torch.channels_last)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


class PartlyUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = tanh_net()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.frozen(x))


def physics(module: nn.Module, batch: Any) -> Tensor:
    """A loss with the derivative of the network by its input inside."""
    x = batch[0].clone().requires_grad_()
    out = module(x).sum(1)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return (slope.pow(2).sum(1) - out).square().mean()


def functional(module: nn.Module, batch: Any) -> Tensor:
    weights = dict(module.named_parameters())

    def output(x: Tensor) -> Tensor:
        return torch.func.functional_call(module, weights, (x,)).sum()

    return torch.func.vmap(torch.func.grad(output))(batch[0]).square().mean()


def distances(module: nn.Module, batch: Any) -> Tensor:
    return torch.cdist(module(batch[0]), module(batch[0].flip(0))).square().mean()


def ctc(module: nn.Module, batch: Any) -> Tensor:
    scores = module(batch[0]).log_softmax(-1).transpose(0, 1)
    lengths = torch.full((6,), 3), torch.full((6,), 1)
    return F.ctc_loss(scores, 1 + batch[1].clamp(max=1)[:, None], *lengths)


def warped(module: nn.Module, batch: Any) -> Tensor:
    grid = torch.tanh(module(batch[0].flatten(1))).reshape(4, 2, 2, 2)
    return F.grid_sample(batch[0], grid, align_corners=False).square().mean()


def grid_sample_differentiates_twice() -> bool:
    """Return whether this release of torch knows how; 2.6 does not, 2.13 does."""
    grid = torch.zeros(1, 1, 1, 2, requires_grad=True)
    image = torch.ones(1, 1, 2, 2, requires_grad=True)
    out = F.grid_sample(image, grid, align_corners=False).square().sum()
    (slope,) = torch.autograd.grad(out, grid, create_graph=True)
    try:
        torch.autograd.grad(slope.sum(), image)
    except RuntimeError:
        return False
    return True


def cdist_differentiates_twice() -> bool:
    """Return whether this release of torch knows how; 2.13 does not, 2.14 does."""
    x = torch.arange(6.0, dtype=torch.float64).reshape(3, 2).requires_grad_()
    (slope,) = torch.autograd.grad(torch.cdist(x, x + 1).sum(), x, create_graph=True)
    try:
        torch.autograd.grad(slope.square().sum(), x)
    except (RuntimeError, NotImplementedError):
        return False
    return True


KINDS = [
    Kind("attention, causal", lambda: SelfAttention(is_causal=True), classes()),
    Kind(
        "attention, boolean mask",
        lambda: SelfAttention(attn_mask=torch.ones(3, 3, dtype=torch.bool).tril()),
        classes(),
    ),
    Kind(
        "attention, additive mask",
        lambda: SelfAttention(attn_mask=torch.linspace(-1, 1, 9).double().reshape(3, 3)),
        classes(),
    ),
    Kind("multi-head attention", MultiHead, classes()),
    Kind("multi-head attention, no weights", lambda: MultiHead(need_weights=False), classes()),
    Kind("encoder layer", Encoder, classes()),
    Kind("encoder layer, eval", Encoder, classes(), mode="eval"),
    Kind("encoder layer, padded, eval", lambda: Encoder(padded=True), classes(), mode="eval"),
    Kind("decoder layer", Decoder, classes()),
    Kind("decoder layer, eval", Decoder, classes(), mode="eval"),
    Kind("GPT-2, eager attention", gpt2("eager"), sentences, next_token),
    Kind("GPT-2, fused attention", gpt2("sdpa"), sentences, next_token),
    Kind("RMS norm", lambda: nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4), nn.Linear(4, 3))),
    Kind("compiled module", compiled, convert=False),
    Kind("module compiled in place", compiled_in_place, convert=False),
    Kind("compiled part", compiled_part, convert=False),
    Kind("compiled function", CompiledFunction),
    Kind("checkpoints", lambda: Checkpointed(use_reentrant=False)),
    Kind("reentrant checkpoints", lambda: Checkpointed(use_reentrant=True)),
    Kind("RNN", lambda: Recurrent(nn.RNN, bidirectional=True), classes()),
    Kind("GRU", lambda: Recurrent(nn.GRU, num_layers=2, dropout=0.3), classes()),
    Kind("LSTM", lambda: Recurrent(nn.LSTM), classes()),
    Kind("LSTM, projected", lambda: Recurrent(nn.LSTM, proj_size=2), classes()),
    Kind("LSTM, packed", lambda: Recurrent(nn.LSTM, packed=True), classes()),
    Kind("LSTM cell", lambda: Cell(nn.LSTMCell), classes()),
    Kind("GRU cell", lambda: Cell(nn.GRUCell), classes()),
    Kind("embedding", lambda: Embedded(padding_idx=0), tokens),
    Kind("embedding, sparse gradients", lambda: Embedded(sparse=True), tokens),
    Kind("embedding, scaled by frequency", lambda: Embedded(scale_grad_by_freq=True), tokens),
    Kind(
        "EmbeddingBag, sum",
        lambda: Bag("sum"),
        tokens,
        derivative="none",
        says="add up its vectors",
    ),
    Kind(
        "EmbeddingBag, mean",
        lambda: Bag("mean"),
        tokens,
        derivative="none",
        says="add up its vectors",
    ),
    Kind(
        "EmbeddingBag, max",
        lambda: Bag("max"),
        tokens,
        derivative="none",
        says="add up its vectors",
    ),
    Kind("spectral norm", with_linear(parametrizations.spectral_norm), mode="eval"),
    Kind("spectral norm, old form", with_linear(nn.utils.spectral_norm), mode="eval"),
    Kind("weight norm", with_linear(parametrizations.weight_norm)),
    Kind("weight norm, old form", with_linear(nn.utils.weight_norm)),
    Kind("orthogonal weights", with_linear(parametrizations.orthogonal)),
    Kind(
        "parametrization of one's own",
        with_linear(lambda m: parametrize.register_parametrization(m, "weight", Squared())),
    ),
    Kind("tied weights", Tied),
    Kind("frozen and unused parameters", PartlyUsed),
    Kind("custom function", lambda: Calling(Cube.apply)),
    Kind("straight-through estimator", lambda: Calling(Rounded.apply)),
    Kind("function that blocks", lambda: Calling(Blocking.apply, add=True)),
    Kind(
        "once differentiable function",
        lambda: Calling(OnceCube.apply),
        derivative="none",
        says="once_differentiable.*gradgradcheck",
    ),
    Kind(
        "function with a kernel's backward",
        lambda: Calling(KernelCube.apply),
        derivative="none",
        says="KernelCube.*gradgradcheck",
    ),
    Kind(
        "operator of torch.library without a second derivative",
        lambda: Calling(library_cube),
        derivative="none",
        says="cube_backward.*gradgradcheck",
    ),
    Kind(
        "kernels that are registered alone",
        lambda: Calling(torch.ops.lla_tests_bare.cube),
        derivative="none",
        says="no autograd formula.*gradgradcheck",
    ),
    Kind(
        "cdist",
        tanh_net,
        loss=distances,
        derivative="exact" if cdist_differentiates_twice() else "none",
        says="Write the distances out",
    ),
    Kind("CTC loss", tanh_net, classes(), ctc, derivative="none", says="ctc_loss.*Give loss="),
    Kind(
        "grid sample",
        lambda: nn.Sequential(nn.Linear(32, 8)),
        images,
        warped,
        derivative="exact" if grid_sample_differentiates_twice() else "none",
        says="grid_sampler_2d_backward",
    ),
    Kind("complex numbers in between", Spectral),
    Kind("parameters in lists, without dimensions", Lists),
    Kind("lazy modules", lazy),
    Kind("forward hooks", hooked),
    Kind("scripted module", scripted),
    Kind("traced module", traced),
    Kind("values looked at", Branching),
    Kind("in-place activations", in_place),
    Kind("channels last", channels_last, images),
    Kind("loss with derivatives inside", tanh_net, loss=physics),
    Kind("functional transforms inside", tanh_net, loss=functional),
]


def dense_by_differences(
    module: nn.Module, batches: list[Any], loss: Loss, mode: str, step: float = 1e-5
) -> Tensor:
    """Return the Hessian ``(dim, dim)`` by differences of ``backward()``, error about 1e-8."""
    module.train(mode == "batch")
    for m in module.modules():
        # Dropout off by the plainest means there is.
        if getattr(m, "original_name", "") == "Dropout":
            m.eval()
            continue
        if isinstance(getattr(m, "dropout", None), float):
            m.dropout = 0.0
        if isinstance(getattr(m, "p", None), float):
            m.p = 0.0
        if isinstance(m, nn.Embedding):
            # What the scale makes is no derivative of the loss.
            m.scale_grad_by_freq = False
    parameters = [p for p in module.parameters() if p.requires_grad]
    buffers = [(b, b.clone()) for b in module.buffers()]
    (batch,) = batches

    def gradient() -> Tensor:
        for p in parameters:
            p.grad = None
        with warnings.catch_warnings():
            # What the compiler has to say about its own doings.
            warnings.simplefilter("ignore")
            loss(module, batch).backward()
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        for b, value in buffers:
            b.data.copy_(value)
        return torch.cat([(g.to_dense() if g.is_sparse else g).reshape(-1) for g in found])

    columns = []
    for p in parameters:
        for i in range(p.numel()):
            at = tuple(int(k) for k in torch.unravel_index(torch.tensor(i), p.shape))
            kept = float(p.data[at])
            p.data[at] = kept + step
            upper = gradient()
            p.data[at] = kept - step
            columns.append((upper - gradient()) / (2 * step))
            p.data[at] = kept
    for p in parameters:
        p.grad = None
    dense = torch.stack(columns, dim=1).detach()
    # What has no gradient, such as the vector of a padding token, is a constant.
    dense[:, (dense == 0).all(dim=1)] = 0
    return dense

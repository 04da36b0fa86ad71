"""Copies of tensors and objects, at the level of the guard."""

import contextlib
import io
import types

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear

from lla_callbacks import measure_hessian
from lla_callbacks.linalg.errors import MeasurementError
from lla_callbacks.objective import tensor_copies
from lla_callbacks.objective.precision import at_precision
from lla_callbacks.objective.stand_ins import RefusedError
from lla_callbacks.objective.state import preserved
from lla_callbacks.objective.tensor_copies import differ, restored_values, same_bits, separate

LARGE = 2 * tensor_copies.LAZY_BYTES // 4


@pytest.mark.parametrize("lazily", [True, False])
@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.add_(1),
        lambda t: t.data.add_(1),
        lambda t: t[3:5].fill_(7),
        lambda t: t.numpy().fill(3),
        lambda t: t.untyped_storage().fill_(1),
        lambda t: t.view(torch.int32).zero_(),
    ],
    ids=["in place", "data", "view", "numpy", "storage", "bits"],
)
def test_neither_side_sees_what_is_written_to_the_other(monkeypatch, write, lazily):
    if not lazily:
        monkeypatch.setattr(tensor_copies, "_lazy", None)
    for first in (True, False):
        original = torch.randn(LARGE)
        kept = original.numpy().copy()
        copied = separate(original)
        assert not differ(original, copied)
        write(original if first else copied)
        assert differ(original, copied)
        untouched = copied if first else original
        assert same_bits(untouched, torch.from_numpy(kept))


def test_a_large_copy_takes_no_memory_until_it_is_written():
    original = torch.randn(LARGE)
    address = torch._C._data_address
    copied = separate(original)
    assert address(copied) == address(original)
    before, version = address(original), original._version
    copied.data.mul_(2)
    assert address(copied) != address(original) == before
    assert original._version == version


@pytest.mark.parametrize("shared", [True, False])
def test_memory_that_is_not_torchs_own_is_copied_at_once(shared):
    original = torch.zeros(LARGE)
    original = original.share_memory_() if shared else torch.from_numpy(original.numpy().copy())
    copied = separate(original)
    copied.add_(1)
    assert float(original.sum()) == 0


class Base(nn.Module):
    """A frozen base that is read by linear layers, and a small trained part."""

    def __init__(self):
        super().__init__()
        self.base = nn.ModuleList(nn.Linear(256, 256).requires_grad_(False) for _ in range(3))
        self.head = nn.Linear(256, 3)

    def forward(self, x):
        for layer in self.base:
            self.note(torch._C._data_address(layer.weight))
            x = torch.tanh(layer(x))
        return self.head(x)


def loss_of(module, batch):
    return cross_entropy(module(batch[0]), batch[1])


def test_a_frozen_base_is_never_copied_where_it_is_only_read(monkeypatch):
    # Kept by a library: whatever the step's own functions lead to would be put back.
    monkeypatch.setattr(torch, "seen", seen := set(), raising=False)
    module = Base()
    own = {torch._C._data_address(layer.weight) for layer in module.base}
    batch = torch.randn(8, 256), torch.randint(0, 3, (8,))
    # By the class: what the module itself refers to would be copied with it.
    type(module).note = lambda self, address: torch.seen.add(address)
    try:
        measure_hessian(module, [batch], loss=loss_of, num_steps=3, num_probes=2)
    finally:
        del type(module).note
    assert seen == own
    assert {torch._C._data_address(layer.weight) for layer in module.base} == own


class Quantized(nn.Parameter):
    """As the weights of 8-bit layers: of a class of its own, with attributes."""

    def __new__(cls, values, scale):
        self = torch.Tensor._make_subclass(cls, values, False)
        self.scale = scale
        return self


class Quantizing(nn.Module):
    def __init__(self, size=4, *, writes=False):
        super().__init__()
        values = torch.randint(-127, 127, (3, size)).to(torch.int8)
        self.w = Quantized(values, 0.01)
        self.a = nn.Parameter(torch.randn(3, size) * 0.1)
        self.writes = writes

    def forward(self, x):
        assert type(self.w) is Quantized
        if self.writes:
            self.w.data.add_(1)
            self.w.scale *= 2
        return linear(x, self.w.float() * self.w.scale + self.a)


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("size", [4, 2**15])
def test_weights_of_a_class_of_their_own_stay_what_they_are(size, writes):
    torch.manual_seed(0)
    module = Quantizing(size, writes=writes)
    batch = torch.randn(8, size) / size**0.5, torch.randint(0, 3, (8,))
    weight, kept = module.w, module.w.detach().clone()
    found = measure_hessian(module, [batch], loss=loss_of, num_steps=3, num_probes=2)
    assert module.w is weight
    assert torch.equal(module.w, kept)
    assert module.w.scale == 0.01
    plain = Quantizing(size)
    plain.w, plain.a = Quantized(kept + writes, 0.01 * (1 + writes)), module.a
    right = measure_hessian(plain, [batch], loss=loss_of, num_steps=3, num_probes=2)
    assert found.lambda_max == pytest.approx(right.lambda_max, rel=1e-5)


class Own(torch.Tensor):
    """Stays what it is when it is detached."""


def test_only_ordinary_tensors_are_copied_lazily():
    # What torch counts below a class of its own, such as a distributed tensor, is not known.
    for tensor, lazy in ((torch.zeros(LARGE), True), (torch.zeros(LARGE).as_subclass(Own), False)):
        same = torch._C._data_address(separate(tensor)) == torch._C._data_address(tensor)
        assert same == lazy


def test_values_are_put_back_where_they_were_written_alone():
    written, read = torch.zeros(LARGE), torch.zeros(3)
    with restored_values([written, read]):
        written.data.fill_(2)
        version = read._version
    assert float(written.sum()) == 0
    assert read._version == version


# -- half precision -------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """Keeps its hidden state, and refers to its weights in other places as well."""

    def __init__(self, kind, dtype):
        super().__init__()
        self.cell = kind(3, 4, batch_first=True)
        self.head = nn.Linear(4, 3)
        self.to(dtype)
        self.places = [self.head.weight, {"bias": self.head.bias}]
        self.box = types.SimpleNamespace(weight=self.head.weight, alias=self.head.weight.data)
        self.kind_of_number = dtype
        self.hidden = None

    def forward(self, x):
        outputs, hidden = self.cell(x.to(self.kind_of_number), self.hidden)
        self.hidden = (
            tuple(h.detach() for h in hidden) if isinstance(hidden, tuple) else hidden.detach()
        )
        assert self.places[0] is self.box.weight is self.head.weight
        assert self.places[1]["bias"] is self.head.bias
        assert torch.equal(self.box.alias, self.head.weight)
        return outputs[:, -1] @ self.places[0].T + self.places[1]["bias"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
@pytest.mark.parametrize("mixed", [True, False])
def test_state_in_half_precision_is_widened_with_the_weights(kind, dtype, mixed):
    torch.manual_seed(0)
    module = Recurrent(kind, torch.float32 if mixed else dtype)
    batch = torch.randn(8, 5, 3), torch.randint(0, 3, (8,))
    with torch.no_grad():
        module(batch[0])
    if mixed:  # as autocast leaves it behind
        hidden = module.hidden
        module.hidden = (
            tuple(h.to(dtype) for h in hidden) if isinstance(hidden, tuple) else hidden.to(dtype)
        )
    kept = module.hidden
    found = measure_hessian(module, [batch], loss=loss_of, num_steps=3, num_probes=2)
    assert found.precision == "float32"
    assert module.hidden is kept
    assert module.places[0] is module.head.weight
    assert module.head.weight.dtype is (torch.float32 if mixed else dtype)


def test_references_elsewhere_lead_to_the_widened_weights_when_these_move():
    module = Recurrent(nn.GRU, torch.bfloat16)
    with at_precision(module, "float32"), preserved(module, seed=0, widen=True):
        module.head.weight.data.add_(1)
        assert module.places[0] is module.head.weight
        assert torch.equal(module.box.alias, module.head.weight)
        assert module.kind_of_number is torch.float32
        module.head.weight.data.sub_(1)


# -- what is refused ------------------------------------------------------------------------------


def test_a_stand_in_can_be_looked_at_and_nothing_else():
    module = nn.Linear(2, 2)
    module.file = stream = io.TextIOWrapper(io.BytesIO(b"a\nb\n"))

    def looked_at():
        with preserved(module, seed=0):
            assert module.file is not stream
            assert isinstance(module.file, io.TextIOWrapper)
            assert module.file
            assert module.file is not None

    looked_at()
    for use in (next, str, len, list, lambda f: f.name, lambda f: f.write("x")):
        with (
            pytest.raises(RefusedError, match=r"self\.file \(TextIOWrapper\)"),
            preserved(module, seed=0),
        ):
            use(module.file)

    # Nor by a step that takes no notice of the error.
    def careless():
        with preserved(module, seed=0), contextlib.suppress(Exception):
            next(module.file)

    with pytest.raises(MeasurementError, match=r"self\.file"):
        careless()
    assert stream.readline() == "a\n"

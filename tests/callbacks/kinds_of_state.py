"""Kinds of state that a training step may touch, each with how it begins and how it goes on."""

import argparse
import array
import collections
import copy
import dataclasses
import functools
import io
import itertools
import os
import queue
import random
import threading
import types
import weakref
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.utils.parametrize
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from .modules import data, plain_loss, small_net


@dataclasses.dataclass
class Kind:
    """One kind of state: how it begins, and how a step changes it and takes a number from it."""

    start: Any
    advance: Any
    refused: str = ""
    data: Any = None
    settings: dict = dataclasses.field(default_factory=dict)


KINDS: dict[str, Kind] = {}


def kind(name, start, advance, refused="", **more):
    assert name not in KINDS
    KINDS[name] = Kind(start, advance, refused, **more)


class Module(pl.LightningModule):
    """The state counts in the loss, so that whatever is lost or advanced is seen in the weights."""

    history: list = []  # noqa: RUF012 - the kind of state is meant
    count = 0

    def __init__(self, kind):
        super().__init__()
        self.net = small_net()
        self.spare = nn.Linear(3, 2)
        self.kind_of_state = kind.advance
        kind.start(self)

    def training_step(self, batch, batch_idx):
        number = self.kind_of_state(self, batch)
        if not (isinstance(number, torch.Tensor) and number.requires_grad):
            number = torch.as_tensor(float(number))
        loss = plain_loss(self, batch) * (1 + 0.01 * number.tanh())
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), 0.05)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


class Box:
    """An object of the user's own."""

    def __init__(self, value=0.0):
        self.value = value
        self.tensor = torch.zeros(2)
        self.items = []

    def advance(self):
        self.value += 1
        self.tensor.add_(1)
        self.items.append(self.value)
        return self.value + float(self.tensor.sum()) + len(self.items)


class Slotted:
    __slots__ = ("tensor", "value")

    def __init__(self):
        self.value, self.tensor = 0, torch.zeros(1)


class Counted:
    total = 0
    seen: list = []  # noqa: RUF012

    def advance(self):
        Counted.total += 1
        self.seen.append(1)
        return Counted.total + len(self.seen)


@dataclasses.dataclass
class Record:
    number: int = 0
    inner: dict = dataclasses.field(default_factory=dict)


class Linked:
    """Two ways to one object, and a way back to itself."""

    def __init__(self):
        self.box = Box()
        self.again = self.box
        self.me = self


class Replay:
    """A buffer of past batches, with a generator and a lock of its own."""

    def __init__(self):
        self.lock = threading.Lock()
        self.items = collections.deque(maxlen=3)
        self.random = np.random.default_rng(0)

    def draw(self, x):
        with self.lock:
            self.items.append((x.clone(), {"number": len(self.items)}))
            i = self.random.integers(len(self.items))
            stored = self.items[i][0]
            stored.mul_(0.9)
            return stored.sum()


class Holder:
    """Refers to the module and to its parameters."""

    def __init__(self, module):
        self.module = module
        self.weights = list(module.net.parameters())
        self.calls = 0

    def advance(self):
        self.calls += 1
        assert self.weights[0] is self.module.net[0].weight
        # With its graph: what is detached makes the gradient no derivative of the loss.
        return self.calls + self.module.spare.weight.sum() + self.weights[1].sum()


class Countdown:
    """An iterator of the user's own."""

    def __init__(self):
        self.n = 100

    def __iter__(self):
        return self

    def __next__(self):
        self.n -= 1
        return self.n


class Picky(dict):
    """A mapping that keeps a count beside its items."""

    def __init__(self):
        super().__init__()
        self.writes = 0

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self.writes += 1


def attribute(value, advance):
    """Return start and advance of a kind that is kept as self.s."""

    def start(module):
        module.s = value(module) if getattr(value, "wants_module", False) else value()

    return start, lambda module, batch: advance(module.s)


def wants_module(function):
    function.wants_module = True
    return function


def append(s):
    s.append(len(s) + 1)
    return len(s)


def count_up(s):
    s.n = getattr(s, "n", 0) + 1
    return s.n


def entry_up(s):
    s["n"] = s.get("n", 0) + 1
    return s["n"]


def first_up(s):
    s[0] += 1
    return s[0]


# -- containers and objects ---------------------------------------------------------------------

kind("list", *attribute(list, append))
kind("dict of lists", *attribute(lambda: {"a": []}, lambda s: append(s["a"])))
kind("tuple of lists", *attribute(lambda: ([], 1), lambda s: append(s[0])))
kind("deque", *attribute(lambda: collections.deque(maxlen=3), lambda s: s.append(1) or len(s)))
kind("defaultdict", *attribute(lambda: collections.defaultdict(list), lambda s: append(s["x"])))
kind("Counter", *attribute(collections.Counter, lambda s: s.update("ab") or sum(s.values())))
kind("OrderedDict", *attribute(collections.OrderedDict, entry_up))
kind("ChainMap", *attribute(lambda: collections.ChainMap({}, {"n": 3}), entry_up))
kind("UserDict", *attribute(collections.UserDict, entry_up))
kind("UserList", *attribute(collections.UserList, append))
kind("dict of the user's", *attribute(Picky, lambda s: s.__setitem__("n", 1) or s.writes))
kind("set of objects", *attribute(lambda: {Box()}, lambda s: next(iter(s)).advance()))
kind("Namespace", *attribute(argparse.Namespace, count_up))
kind("SimpleNamespace", *attribute(types.SimpleNamespace, count_up))
kind("bytearray", *attribute(lambda: bytearray(3), first_up))
kind("array", *attribute(lambda: array.array("d", [0.0]), first_up))
kind("StringIO", *attribute(io.StringIO, lambda s: s.write("x") and len(s.getvalue())))
kind("dataclass", *attribute(Record, lambda s: entry_up(s.inner)))
kind("slots", *attribute(Slotted, lambda s: setattr(s, "value", s.value + 1) or s.value))
kind("object of the user's", *attribute(Box, Box.advance))
kind("list of objects", *attribute(lambda: [Box(), Box()], lambda s: s[1].advance()))
kind("objects that share", *attribute(Linked, lambda s: s.box.advance() + s.me.again.value))
kind("replay buffer", lambda m: setattr(m, "s", Replay()), lambda m, b: m.s.draw(b[0]))
kind("object of the module", *attribute(wants_module(Holder), Holder.advance))
kind("iterator of the user's", *attribute(Countdown, next))
kind("iterator of a list", *attribute(lambda: iter(list(range(1000))), next))
kind(
    "mapping proxy", *attribute(lambda: types.MappingProxyType({"a": []}), lambda s: append(s["a"]))
)
kind("exception", *attribute(lambda: ValueError([]), lambda s: append(s.args[0])))
kind("class of the user's", *attribute(Counted, Counted.advance))


def class_attributes(module, batch):
    type(module).count += 1
    module.history.append(1)
    return type(module).count + len(Module.history)


kind("class attributes", lambda m: (setattr(Module, "count", 0), Module.history.clear()),
     class_attributes)  # fmt: skip


class Only(Box):
    """There is one of its kind."""

    one = None

    def __new__(cls):
        if cls.one is None:
            cls.one = super().__new__(cls)
        return cls.one


class Itself(Box):
    """Says that it is its own copy."""

    def __deepcopy__(self, memo):
        return self


class Named(Box):
    """Is pickled by a name."""

    def __reduce__(self):
        return "a_global"


class Partly(Box):
    """Leaves something out of what it pickles."""

    def __getstate__(self):
        return {"value": self.value, "items": self.items}


Pair = collections.namedtuple("Pair", ["a", "b"])


def fresh_only():
    Only.one = None
    return Only()


kind("only one of its kind", *attribute(fresh_only, Box.advance))
kind("its own copy", *attribute(Itself, Box.advance))
kind("pickled by a name", *attribute(Named, Box.advance))
kind("pickled in part", *attribute(Partly, Box.advance))
kind("named tuple", *attribute(lambda: Pair([], 1), lambda s: append(s.a)))
kind("keys that are objects", *attribute(lambda: {Box(): 1}, lambda s: next(iter(s)).advance()))


def forget_helper(module):
    if "helper" in Module.__dict__:
        del Module.helper


def add_a_method(module, batch):
    number = module.helper() if hasattr(module, "helper") else 0
    type(module).helper = lambda self: number + 1
    return number


kind("method of the class added", forget_helper, add_a_method)


class Half(nn.Module):
    def forward(self, weight):
        return 0.5 * weight


def parametrize_once(module, batch):
    # Of what is not trained: other variables would be another loss.
    layer = module.constant
    if torch.nn.utils.parametrize.is_parametrized(layer):
        return 2
    if module.global_step == 2:
        torch.nn.utils.parametrize.register_parametrization(layer, "weight", Half())
    return layer.weight.sum()


kind("parametrization added",
     lambda m: setattr(m, "constant", nn.Linear(3, 2).requires_grad_(False)),
     parametrize_once)  # fmt: skip


# -- tensors, arrays, generators ------------------------------------------------------------------


def tensor_with_graph(module, batch):
    module.acc.mul_(0.9).add_(batch[0].mean() * 0.1)
    return module.acc.detach()


def graph_kept(module, batch):
    value = module.acc.detach()
    module.acc = 0.5 * module.acc.detach() + module.net(batch[0]).mean()
    return value


kind("tensor", *attribute(lambda: torch.zeros(1), first_up))
kind("tensor with a graph, in place",
     lambda m: setattr(m, "acc", torch.ones(1, requires_grad=True) * 2),
     tensor_with_graph)  # fmt: skip
kind("tensor with a graph, anew", lambda m: setattr(m, "acc", torch.zeros(())), graph_kept)
kind("leaf that asks for gradients", *attribute(
    lambda: torch.zeros(1, requires_grad=True), lambda s: s.data.add_(1).item()))  # fmt: skip
kind("tensor through .data", *attribute(lambda: torch.zeros(1), lambda s: s.data.add_(1).item()))
kind("tensor through numpy", *attribute(lambda: torch.zeros(1), lambda s: first_up(s.numpy())))


def views(module):
    module.whole = torch.zeros(4)
    module.part = module.whole[1:3]


kind("views of one tensor", views,
     lambda m, b: m.part.add_(1).sum() + m.whole.sum() * 2)  # fmt: skip


def alias_of_a_buffer(module):
    module.register_buffer("mean", torch.zeros(3))
    module.s = [module.mean]


kind("buffer in a list", alias_of_a_buffer, lambda m, b: m.s[0].add_(1).sum() + m.mean.sum())
kind("attribute of a tensor", lambda m: setattr(m.net[0].weight, "note", []),
     lambda m, b: append(m.net[0].weight.note))  # fmt: skip
kind("ndarray", *attribute(lambda: np.zeros(1), first_up))
kind("ndarray of objects", *attribute(lambda: np.array([Box(), None], dtype=object),
     lambda s: s[0].advance()))  # fmt: skip
kind("structured array", *attribute(lambda: np.zeros(1, dtype=[("a", "f8")]),
     lambda s: first_up(s["a"])))  # fmt: skip
kind("torch.Generator", *attribute(lambda: torch.Generator().manual_seed(1),
     lambda s: torch.rand(1, generator=s).item()))  # fmt: skip
kind("numpy Generator", *attribute(lambda: np.random.default_rng(1), lambda s: s.random()))
kind("numpy RandomState", *attribute(lambda: np.random.RandomState(1), lambda s: s.rand()))
kind("random.Random", *attribute(lambda: random.Random(1), lambda s: s.random()))
kind("distribution", *attribute(
    lambda: types.SimpleNamespace(d=torch.distributions.Normal(torch.zeros(1), torch.ones(1))),
    lambda s: s.d.loc.add_(1).item()))  # fmt: skip


# -- modules ------------------------------------------------------------------------------------


def average(module):
    module.s = [copy.deepcopy(module.net).requires_grad_(False)]


def move_average(module, batch):
    with torch.no_grad():
        for slow, fast in zip(module.s[0].parameters(), module.net.parameters(), strict=True):
            slow.data.mul_(0.9).add_(fast.data, alpha=0.1)
    return module.s[0](batch[0]).sum()


def target(module):
    module.target = copy.deepcopy(module.net).requires_grad_(False)


def move_target(module, batch):
    for slow, fast in zip(module.target.parameters(), module.net.parameters(), strict=True):
        slow.data.mul_(0.9).add_(fast.data, alpha=0.1)
    return module.target(batch[0]).sum()


def large_target(module):
    module.target = nn.Linear(3, 30_000).requires_grad_(False)  # large enough to be copied lazily


def move_large_target(module, batch):
    module.target.weight.data.add_(1e-3)
    return module.target(batch[0]).mean()


def collection(module):
    module.s = [MetricCollection({"a": MeanMetric(), "b": MeanMetric()})]


def update_collection(module, batch):
    module.s[0]["a"].update(len(module.s[0]["a"].mean_value.shape) + 1.0)
    module.s[0].update(2.0)
    return module.s[0]["a"].weight


def hook(module):
    module.s = []
    module.net[0].register_forward_hook(lambda m, i, o: module_list.append(1))
    module_list = module.s


kind("module in a list", average, move_average)
kind("target network through .data", target, move_target)
kind("large target network through .data", large_target, move_large_target)
kind("metrics in a list", collection, update_collection)
kind("metric", lambda m: setattr(m, "metric", MulticlassAccuracy(2)),
     lambda m, b: m.metric(m.net(b[0]), b[1]) + m.metric.tp.sum())  # fmt: skip
kind("hook with a closure", hook, lambda m, b: len(m.s) + float(m.net[0](b[0]).sum() * 0))
kind("hooks added", lambda m: None,
     lambda m, b: len(m.net[2]._forward_hooks) if m.net[2].register_forward_hook(
         lambda *a: None) else 0)  # fmt: skip


def keep_handle(module):
    module.handle = module.net[1].register_forward_hook(lambda m, i, o: o * 1.1)


def remove_handle(module, batch):
    if module.trainer.global_step == 3:
        module.handle.remove()
    return len(module.net[1]._forward_hooks)


kind("hook removed", keep_handle, remove_handle)
kind("module added", lambda m: None,
     lambda m, b: len(m._modules) if setattr(m, f"new{len(m._modules)}", nn.Tanh()) is None
     else 0)  # fmt: skip


def add_buffer(module, batch):
    module.register_buffer(f"b{len(module._buffers)}", torch.ones(1), persistent=False)
    return len(module._buffers)


kind("buffer added", lambda m: None, add_buffer)
kind("module replaced", lambda m: None,
     lambda m, b: setattr(m, "spare", nn.Linear(3, 2)) or m.spare.weight.sum())  # fmt: skip
kind("weak reference", lambda m: (setattr(m, "s", Box()), setattr(m, "r", weakref.ref(m.s))),
     lambda m, b: m.r().advance() + m.s.value)  # fmt: skip
kind("weak proxy", lambda m: (setattr(m, "s", Box()), setattr(m, "r", weakref.proxy(m.s))),
     lambda m, b: m.r.advance() + m.s.value)  # fmt: skip


def weak_values(module):
    module.s = Box()
    module.r = weakref.WeakValueDictionary({"a": module.s})


kind("weak values", weak_values, lambda m, b: m.r["a"].advance() + m.s.value)


# -- functions ----------------------------------------------------------------------------------


def counter_in_a_closure():
    n = 0

    def count():
        nonlocal n
        n += 1
        return n

    return count


def function_with_an_attribute():
    def count():
        count.n += 1
        return count.n

    count.n = 0
    return count


def function_with_a_default():
    def count(memory=[]):  # noqa: B006 - the kind of state is meant
        memory.append(1)
        return len(memory)

    return count


def partial_of_a_list():
    items = []
    return functools.partial(lambda s: s.append(1) or len(s), items)


kind("closure", *attribute(counter_in_a_closure, lambda s: s()))
kind("attribute of a function", *attribute(function_with_an_attribute, lambda s: s()))
kind("default of a function", *attribute(function_with_a_default, lambda s: s()))
kind("partial", *attribute(partial_of_a_list, lambda s: s()))
kind("method of a list", lambda m: (setattr(m, "s", []), setattr(m, "add", m.s.append)),
     lambda m, b: m.add(1) or len(m.s))  # fmt: skip
kind("method of an object", *attribute(lambda: Box().advance, lambda s: s()))


# -- what cannot be copied ----------------------------------------------------------------------


def numbers():
    for i in range(10**6):
        yield i * 0.01


def filled(kind):
    s = kind()
    for i in range(1000):
        s.put(i)
    return s


def swallowed(s):
    try:
        return next(s)
    except Exception:  # noqa: BLE001 - as users do
        return 0


def loop(**settings):
    return DataLoader(TensorDataset(torch.arange(400.0).reshape(-1, 1)), 4, **settings)


kind("generator", *attribute(numbers, next), refused="self.s ")
kind("generator, caught", *attribute(numbers, swallowed), refused="self.s ")
kind("generator in a dict", *attribute(lambda: {"a": [numbers()]}, lambda s: next(s["a"][0])),
     refused=r"self\.s\['a'\]\[0\]")  # fmt: skip
kind("itertools.cycle", *attribute(lambda: itertools.cycle([1, 2, 3]), next), refused="self.s ")
kind("itertools.count", *attribute(itertools.count, next), refused="self.s ")
kind("Queue", *attribute(lambda: filled(queue.Queue), lambda s: s.get()), refused="self.s ")
kind("SimpleQueue", *attribute(lambda: filled(queue.SimpleQueue), lambda s: s.get()),
     refused="self.s ")  # fmt: skip
kind("iterator of a loader", *attribute(lambda: iter(loop()), lambda s: next(s)[0].sum()),
     refused="self.s ")  # fmt: skip
kind("event", *attribute(threading.Event, lambda s: s.set() or s.is_set()), refused="self.s ")


def stream(module):
    module.s = types.SimpleNamespace(source=numbers(), lock=threading.Lock())


def read_stream(module, batch):
    with module.s.lock:
        return next(module.s.source)


kind("generator in an object", stream, read_stream, refused=r"self\.s\.source")
kind("loader", *attribute(
    lambda: loop(shuffle=True, generator=torch.Generator().manual_seed(3)),
    lambda s: next(iter(s))[0].sum() * 0.01))  # fmt: skip


# -- the Trainer --------------------------------------------------------------------------------


def schedulers(module, batch):
    scheduler = module.lr_schedulers()
    scheduler.step()
    return scheduler.last_epoch


def learning_rate(module, batch):
    group = module.optimizers().param_groups[0]
    group["lr"] *= 0.9
    return group["lr"]


def moments(module, batch):
    state = module.trainer.optimizers[0].state[module.net[0].weight]
    if state:
        state["exp_avg"].mul_(0.5)
        return state["exp_avg"].sum() * 100
    return 0


def callback_metrics(module, batch):
    metrics = module.trainer.callback_metrics
    metrics["mine"] = torch.as_tensor(float(metrics.get("mine", 0)) + 1)
    return metrics["mine"]


def stop(module, batch):
    # As at a far point of a plane, where the loss is large.
    module.seen = getattr(module, "seen", 0) + 1
    if "log" in module.__dict__ or module.seen > 100:
        module.trainer.should_stop = True
    return 0


class Data(pl.LightningDataModule):
    def __init__(self):
        super().__init__()
        self.drawn = []
        self.scale = torch.zeros(1)

    def train_dataloader(self):
        return DataLoader(data(), 4)


def data_module(module, batch):
    source = module.trainer.datamodule
    source.drawn.append(1)
    source.scale += 1
    return len(source.drawn) + source.scale.item()


class Tally(pl.Callback):
    def __init__(self):
        self.n = 0


def callback(module, batch):
    tally = next(c for c in module.trainer.callbacks if isinstance(c, Tally))
    tally.n += 1
    return tally.n


def progress(module, batch):
    ready = module.trainer.fit_loop.epoch_loop.batch_progress.total
    ready.ready += 0
    module.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.seen = 1
    return module.trainer.global_step + module.current_epoch + ready.ready


def own_optimizer(module):
    # What is hidden in a list is the user's own to train.
    module.hidden = [nn.Parameter(torch.ones(1))]
    module.s = torch.optim.SGD(module.hidden, 0.1, momentum=0.9)


def step_own(module, batch):
    module.hidden[0].grad = batch[0].mean().reshape(1)
    module.s.step()
    return module.hidden[0].detach() * 10


def hook_on_weight(module, batch):
    module.net[0].weight.register_hook(lambda gradient: 1.1 * gradient)
    return 0


def hook_after_gradient(module, batch):
    def shrink(p):
        p.grad.mul_(0.9)

    module.net[0].weight.register_post_accumulate_grad_hook(shrink)
    return 0


kind("hook on a weight's gradient, added", lambda m: None, hook_on_weight)
kind("hook after a weight's gradient, added", lambda m: None, hook_after_gradient)
kind("should_stop", lambda m: None, stop)
kind("lr_schedulers().step()", lambda m: None, schedulers)
kind("param_groups", lambda m: None, learning_rate)
kind("optimizer.state", lambda m: None, moments)
kind("callback_metrics", lambda m: None, callback_metrics)
kind("data module", lambda m: None, data_module, data=Data)
kind("callback", lambda m: None, callback, settings={"callbacks": [Tally]})
kind("progress of the loops", lambda m: None, progress)
kind("training loader", lambda m: None,
     lambda m, b: next(iter(m.trainer.train_dataloader))[0].sum())  # fmt: skip
kind("a checkpoint written", lambda m: None,
     lambda m, b: m.trainer.save_checkpoint(m.trainer.default_root_dir + "/own.ckpt") or 0,
     refused=r"self\._trainer\.save_checkpoint\(\)")  # fmt: skip
kind("own optimizer", own_optimizer, step_own)
kind("loop's fetcher", lambda m: None,
     lambda m, b: m.trainer.fit_loop._data_fetcher.fetched)  # fmt: skip


# -- logging ------------------------------------------------------------------------------------


def log_by(name):
    def advance(module, batch):
        module.write("number", torch.tensor(float(module.trainer.global_step)), on_epoch=True,
                     on_step=False) if name == "write" else None  # fmt: skip
        if name == "class":
            pl.LightningModule.log(module, "number", 1.0 * module.global_step, on_epoch=True)
        if name == "dict":
            pl.LightningModule.log_dict(module, {"number": 1.0 * module.global_step})
        return 0

    return advance


kind("self.write = self.log", lambda m: setattr(m, "write", m.log), log_by("write"))
kind("partial of self.log", lambda m: setattr(m, "write", functools.partial(m.log, prog_bar=True)),
     log_by("write"))  # fmt: skip
kind("closure over self.log", lambda m: setattr(m, "write", (lambda f: lambda *a, **k: f(*a, **k))(
    m.log)), log_by("write"))  # fmt: skip
kind("LightningModule.log", lambda m: None, log_by("class"))
kind("LightningModule.log_dict", lambda m: None, log_by("dict"))


def write_to_logger(module, batch):
    module.logger.log_metrics({"own": float(module.global_step)}, step=module.global_step)
    module.logger.experiment.log_metrics({"other": 1.0}, step=module.global_step)
    assert isinstance(module.logger, CSVLogger)
    assert module.logger.log_dir == module.trainer.log_dir
    assert module.logger.name == "logs"
    return len(module.logger.log_dir) * 0


kind("loggers", lambda m: None, write_to_logger, settings={"logger": CSVLogger})


# -- what no attribute leads to -----------------------------------------------------------------

GENERATOR, NUMPY, DRAWS = torch.Generator(), np.random.RandomState(0), []
AVERAGE, TEACHER, ENDLESS = torch.zeros(1), nn.Linear(3, 2), numbers()
TOTAL = 0


def begin_globals(module):
    global TOTAL, ENDLESS
    TOTAL, ENDLESS = 0, numbers()
    GENERATOR.manual_seed(1)
    NUMPY.seed(1)
    DRAWS.clear()
    AVERAGE.zero_()
    nn.init.ones_(TEACHER.weight)
    nn.init.zeros_(TEACHER.bias)
    called.__dict__.clear()
    remembered.cache_clear()
    remembered_few.cache_clear()
    with_a_default.__defaults__[0].clear()
    ELSEWHERE.__dict__.pop("calls", None)
    ELSEWHERE.held.clear()


def count_a_global(module, batch):
    global TOTAL
    TOTAL += 1
    return TOTAL


def move_teacher(module, batch):
    with torch.no_grad():
        TEACHER.weight.mul_(0.9)
    return TEACHER(batch[0]).sum()


def called():
    called.calls = getattr(called, "calls", 0) + 1
    return called.calls


@functools.cache
def remembered(size):
    return torch.rand(size)


@functools.lru_cache(maxsize=4)
def remembered_few(size, scale=1.0):
    return scale * torch.rand(size, generator=GENERATOR)


def with_a_default(held=[]):  # noqa: B006 - the kind of state is meant
    held.append(1)
    return len(held)


# A module of the user's own, as `import elsewhere` has it.
ELSEWHERE = types.ModuleType("elsewhere")
exec("held = []\ndef put(x):\n    held.append(x)\n    return len(held)", ELSEWHERE.__dict__)


def count_elsewhere(module, batch):
    ELSEWHERE.calls = getattr(ELSEWHERE, "calls", 0) + 1
    return ELSEWHERE.calls + ELSEWHERE.put(1)


def outside(name, advance, **more):
    kind(name, begin_globals, advance, **more)


outside("global list", lambda m, b: DRAWS.append(b[0].mean()) or sum(DRAWS))
outside("global number", count_a_global)
outside("global generator", lambda m, b: torch.rand(1, generator=GENERATOR))
outside("global generator of numpy", lambda m, b: NUMPY.rand())
outside("global tensor in place", lambda m, b: AVERAGE.add_(b[0].mean()).sum())
outside("global module, moved", move_teacher)
outside("global generator function", lambda m, b: next(ENDLESS), refused="ENDLESS ")
outside("attribute of a global function", lambda m, b: called())
outside("default of a global function", lambda m, b: with_a_default())
outside("lru_cache of random numbers", lambda m, b: remembered(2).sum())
outside("lru_cache, bounded", lambda m, b: remembered_few(2, scale=2.0).sum())
outside("another module of the user's", count_elsewhere)


def count_in_environment(module, batch):
    os.environ["LLA_TEST_COUNT"] = str(int(os.environ.get("LLA_TEST_COUNT", "0")) + 1)
    return int(os.environ["LLA_TEST_COUNT"])


kind("environment variable", lambda m: os.environ.pop("LLA_TEST_COUNT", None), count_in_environment)


def class_that_closes_over():
    total, held = 0, []

    class Closed:
        def advance(self):
            nonlocal total
            total += 1
            held.append(1)
            return total + len(held)

    return Closed()


kind("closure of a class", *attribute(class_that_closes_over, lambda s: s.advance()))

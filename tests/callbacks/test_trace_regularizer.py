"""The regularizer inside a Trainer, against training loops written out by hand in float64."""

import math

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lla_callbacks import HessianTraceRegularizer
from lla_callbacks.linalg.probes import generator, signs

from .modules import quiet_trainer

STRENGTH = 1e-3
SIGMA = math.sqrt(2 * STRENGTH)


def regularizer(strength=STRENGTH, **settings):
    return HessianTraceRegularizer(strength, **settings)


def double_loader(size=24, batch_size=4):
    source = torch.Generator().manual_seed(7)
    x = torch.randn(size, 3, generator=source, dtype=torch.float64)
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size)


class Double(pl.LightningModule):
    """Batch norm, dropout, an unused weight and a tied one, in float64."""

    def __init__(self, make_optimizer=None, dropout=0.0):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3, 4, bias=False),
            nn.BatchNorm1d(4),
            nn.Tanh(),
            nn.Dropout(dropout),
            nn.Linear(4, 2),
        ).double()
        self.make_optimizer = make_optimizer or (
            lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9)
        )

    def loss(self, batch):
        return cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


def displaced_gradient(module, batch, distance, step, loss):
    """The gradient at weights moved by a distance times the step's signs, by plain means."""
    source = generator(0, step, 0)
    parameters = list(module.parameters())
    kept = [p.detach().clone() for p in parameters]
    buffers = [b.clone() for b in module.buffers()]
    random = torch.get_rng_state()
    for p in parameters:
        z = signs(p.numel(), source, dtype=p.dtype, device=p.device)
        p.data.add_(distance * z.reshape(p.shape))
    gradients = torch.autograd.grad(loss(batch), parameters)
    torch.set_rng_state(random)
    for b, kept_buffer in zip(module.buffers(), buffers, strict=True):
        b.copy_(kept_buffer)
    for p, original in zip(parameters, kept, strict=True):
        p.data.copy_(original)
    return gradients


def train_by_hand(
    module, batches, sigma=lambda step: SIGMA, accumulate=1, clip=None, epochs=1, context=None
):
    """Plain SGD-like training on the mean of the gradients at both displaced weights."""
    optimizer = module.configure_optimizers()
    module.train()

    def loss(batch):
        if context is None:
            return module.loss(batch)
        with context():
            return module.loss(batch)

    step = 0
    for _ in range(epochs):
        for i, batch in enumerate(batches):
            distance = sigma(step)
            if distance:
                pair = [
                    displaced_gradient(module, batch, d, step, loss) for d in (distance, -distance)
                ]
                gradients = [(a + b) / 2 for a, b in zip(*pair, strict=True)]
                with torch.no_grad():  # running statistics and the random stream move on
                    loss(batch)
            else:
                gradients = torch.autograd.grad(loss(batch), list(module.parameters()))
            for p, g in zip(module.parameters(), gradients, strict=True):
                share = g / accumulate
                p.grad = share if p.grad is None else p.grad + share
            if (i + 1) % accumulate == 0:
                if clip:
                    torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
    return module


def deviation(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


def compare(tmp_path, make, callback, by_hand=None, **settings):
    """Return how far training with the callback is from the loop by hand, and from none."""
    torch.manual_seed(3)
    trained = make()
    quiet_trainer(tmp_path, [callback], **settings).fit(trained, double_loader())
    torch.manual_seed(3)
    reference = make()
    train_by_hand(reference, double_loader(), **(by_hand or {}))
    torch.manual_seed(3)
    plain = make()
    quiet_trainer(tmp_path, **settings).fit(plain, double_loader())
    return deviation(trained, reference), deviation(trained, plain)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.05),
    "fused adam": lambda p: torch.optim.Adam(p, 0.05, fused=True),
    "fused sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
}


def scaler_plugin():
    # Autocast leaves float64 alone, so that only the scaler is at work.
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("settings", "by_hand"),
    [
        pytest.param({}, {}, id="plain"),
        pytest.param({"accumulate_grad_batches": 2}, {"accumulate": 2}, id="accumulation"),
        pytest.param({"gradient_clip_val": 0.1}, {"clip": 0.1}, id="clipping"),
        pytest.param({"plugins": True}, {}, id="scaler"),
        pytest.param(
            {"plugins": True, "accumulate_grad_batches": 3, "gradient_clip_val": 0.1},
            {"accumulate": 3, "clip": 0.1},
            id="all",
        ),
    ],
)
def test_training_is_the_loop_by_hand(tmp_path, optimizer, settings, by_hand):
    if "fused" in optimizer and settings.get("plugins") and "gradient_clip_val" in settings:
        pytest.skip("Lightning refuses to clip the scaled gradients of a fused optimizer")
    if settings.get("plugins"):
        settings = {**settings, "plugins": [scaler_plugin()]}
    error, effect = compare(
        tmp_path, lambda: Double(OPTIMIZERS[optimizer]), regularizer(), by_hand, **settings
    )
    assert error < 1e-12
    assert effect > 1e-5


def test_dropout_has_the_same_mask_in_every_pass(tmp_path):
    error, effect = compare(tmp_path, lambda: Double(dropout=0.5), regularizer())
    assert error < 1e-12
    assert effect > 1e-5

"""Half-precision modules are measured in float32, and come back untouched."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lla_callbacks import loss_line, measure_hessian
from lla_callbacks.objective.families import Offsets
from lla_callbacks.objective.objective import Objective
from lla_callbacks.objective.points import PointSettings, evaluate_points, space_of
from lla_callbacks.objective.precision import at_precision, original_of


class Net(nn.Module):
    """Tied weights, a buffer, and a frozen part."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 3)
        self.last.bias.requires_grad_(False)
        self.to(dtype)

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.second(torch.tanh(self.first(x))))))


def loss(module, batch):
    return cross_entropy(module(batch[0]), batch[1])


def batches(dtype):
    torch.manual_seed(1)
    return [(torch.randn(16, 4).to(dtype), torch.randint(3, (16,)))]


def float32_twin(module):
    twin = Net()
    twin.load_state_dict({k: v.float() for k, v in module.state_dict().items()})
    return twin


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_module_is_measured_in_float32(dtype):
    module = Net(dtype)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    objects = {name: id(p) for name, p in module.named_parameters()}
    report = measure_hessian(module, batches(dtype), loss=loss)
    wide = [(x.float(), y) for x, y in batches(dtype)]
    twin = measure_hessian(float32_twin(module), wide, loss=loss)
    assert report.precision == "float32"
    assert float(report.lambda_max) == float(twin.lambda_max)
    assert report.trace == twin.trace
    assert {name: id(p) for name, p in module.named_parameters()} == objects
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())
    assert module.second.weight is module.first.weight


def test_training_precision_keeps_the_halves_and_says_so():
    report = measure_hessian(
        Net(torch.bfloat16), batches(torch.bfloat16), loss=loss, precision="training"
    )
    assert report.precision == "bfloat16"
    # Nothing surer than the arithmetic is.
    assert report.lambda_max.residual >= 0.01 * abs(report.lambda_max)


def test_float64_stays_float64():
    assert measure_hessian(
        Net(torch.float64), batches(torch.float64), loss=loss
    ).precision == "float64"  # fmt: skip


def test_copies_know_what_they_stand_for_and_leave_after_an_exception():
    module = Net(torch.bfloat16)
    weight = module.first.weight

    def inside():
        with at_precision(module, "float32"):
            assert module.first.weight is not weight
            assert module.second.weight is module.first.weight
            assert original_of(module.first.weight) is weight
            assert module.norm.running_mean.dtype == torch.float32
            assert not module.last.bias.requires_grad
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        inside()
    assert module.first.weight is weight
    assert module.norm.running_mean.dtype == torch.bfloat16


def test_a_precision_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match=r"precision is '64'; give one of float32, training"):
        measure_hessian(Net(), batches(torch.float32), loss=loss, precision="64")


class OwnAutocast(nn.Module):
    """A module that opens its own autocast regions: one anew, one that it keeps."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.region = torch.autocast("cpu", dtype=torch.bfloat16)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = torch.tanh(self.first(x))
        with self.region:
            return self.last(x).float()


def test_an_autocast_of_the_users_own_is_off_and_comes_back():
    module = OwnAutocast()
    plain = nn.Sequential(module.first, nn.Tanh(), module.last)
    before = loss(module, batches(torch.float32)[0])
    report = measure_hessian(module, batches(torch.float32), loss=loss)
    twin = measure_hessian(plain, batches(torch.float32), loss=loss)
    assert report.precision == "float32"
    assert abs(report.lambda_max - twin.lambda_max) <= 2 * twin.lambda_max.residual
    line = loss_line(module, batches(torch.float32), loss=loss, alphas=[-1.0, 0.0, 1.0])
    assert line.loss[1] == pytest.approx(twin.loss, rel=1e-6)
    # The region that the module keeps works again.
    assert torch.equal(loss(module, batches(torch.float32)[0]), before)


@pytest.mark.parametrize("evaluation", ["loop", "auto"])
def test_points_have_casts_of_their_own_weights_in_an_autocast_that_stays_on(evaluation):
    module, batch = OwnAutocast(), batches(torch.float32)[0]
    objective = Objective(module, [batch], loss, precision="training", check=False)
    space = space_of(objective)
    direction = torch.randn(space.dim, generator=torch.Generator().manual_seed(1))
    points = torch.linspace(-2, 2, 40, dtype=torch.float64)[:, None]
    family = Offsets(space, [direction])
    found = evaluate_points(objective, family, points, PointSettings(evaluation=evaluation)).table
    with torch.no_grad():
        for k in range(0, 40, 13):
            family.place(points[k].tolist())
            assert found[k, 0].item() == pytest.approx(loss(module, batch).item(), rel=1e-6)
    family.restore()


def test_an_autocast_of_the_users_own_that_stays_on_is_said():
    report = measure_hessian(OwnAutocast(), batches(torch.float32), loss=loss, precision="training")
    assert report.precision == "bfloat16 autocast"
    # Nothing surer than the arithmetic is.
    assert report.lambda_max.residual >= 0.01 * abs(report.lambda_max)

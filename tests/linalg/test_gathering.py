"""What large parameters get is added up as it comes: the same product in fewer vectors."""

from __future__ import annotations

import weakref
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lla_callbacks.linalg import gathering
from lla_callbacks.linalg.hessian import HessianOperator
from lla_callbacks.linalg.loss_operator import LossTerm
from lla_callbacks.objective.objective import Objective
from tests.cases import CASES, Case, cross_entropy, trainable


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_products_are_those_of_autograds_own_sums(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for least in (2**60, 1):
        monkeypatch.setattr(gathering, "LEAST", least)
        module, batches, loss = case.build()
        hessian = Objective(module, batches, loss, mode=case.mode, engine="exact").hessian()
        vector = torch.linspace(-1, 1, hessian.shape[0], dtype=torch.float64)
        found.append(hessian @ vector)
        # Once more, by the nodes that are known; and of a part, for which others get nothing.
        assert torch.equal(hessian @ vector, found[-1])
        block = hessian.block(hessian.space.names[::2])
        found.append(block @ vector[: block.shape[0]])
    for one, other in zip(found[:2], found[2:], strict=True):
        eps = torch.finfo(torch.float64).eps
        assert float((one - other).norm()) <= 100 * eps * float(one.norm())


class Large(TorchDispatchMode):
    """Counts what is made that is at least as large as a tensor, in memory at a time."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.size, self.now, self.most = known[0].nbytes, 0, 0
        self._seen = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.untyped_storage().nbytes() >= self.size:
            storage = out.untyped_storage()
            if storage._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self.now += 1
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage._cdata)
        return out

    def _gone(self, key: int) -> None:
        self._seen.discard(key)
        self.now -= 1


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "recomputed"])
def test_a_product_takes_two_vectors_beside_the_one_it_is_of(
    keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = {}
    for least in (2**60, 1):
        monkeypatch.setattr(gathering, "LEAST", least)
        module = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()).double()
        batches = [(torch.randn(3, 4).double(), torch.randint(0, 3, (3,))) for _ in range(2)]
        terms = [
            LossTerm(partial(cross_entropy, module, batch), 0.5, keep=keep) for batch in batches
        ]
        hessian = HessianOperator(terms, trainable(module))
        vector = torch.ones(hessian.shape[0], dtype=torch.float64)
        with Large(*module[2].parameters(), vector) as seen:
            hessian @ vector
        most[least] = seen.most
    # The product and what is being added to it; else a graph's gradient and the sum so far, too.
    assert most[1] == (2 if keep else 4)
    assert most[2**60] > most[1]

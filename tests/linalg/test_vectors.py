"""Vectors in pieces say what whole ones say, however many processes hold them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lla_callbacks.hessian.eigenvectors import leading_eigenvectors
from lla_callbacks.linalg import probes, vectors
from lla_callbacks.linalg.difference import DifferenceOperator
from lla_callbacks.linalg.errors import MeasurementError
from lla_callbacks.linalg.hessian import HessianOperator
from lla_callbacks.linalg.lanczos import LanczosRun, lanczos
from lla_callbacks.linalg.loss_operator import LossOperator, LossTerm
from lla_callbacks.linalg.operators import ScaledOperator, SymmetricOperator
from lla_callbacks.linalg.probes import generator
from lla_callbacks.linalg.trace import TraceEstimator
from lla_callbacks.linalg.vectors import CutVectors, Pieces, Vectors, vectors_of
from tests.linalg.test_lanczos import spectrum
from tests.linalg.test_sharing import Member, together

CPU = torch.device("cpu")
DIM = 23
# Two, and so many that the last ones have little or nothing.
SIZES = [2, 3, 8, 22]
BLOCKS = {"a": slice(0, 9), "b": torch.tensor([9, 12, 22])}
INDICES = tuple(BLOCKS.values())


@pytest.fixture(autouse=True)
def everything_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "LEAST_CUT", 0)


def each(size: int, work: Callable[[Member], Any]) -> list[Any]:
    """Return what each of so many processes finds; what one raises is raised."""
    found = together(size, work)
    for one in found:
        if isinstance(one, Exception):
            raise one
    return found


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def answers(
    space: Vectors, cut: Callable[[Tensor], Tensor], blocks: Any = INDICES
) -> dict[str, Any]:
    """Return everything that is asked of vectors of one layout."""
    a, b, rows = random(DIM), random(DIM, seed=1), torch.linalg.qr(random(DIM, 4, seed=2))[0].T
    parts = [space.local(index) for index in blocks]
    here = cut(rows.T).T
    left, coefficients, size = space.orthogonalised(here, cut(a))
    holes = a.clone()
    holes[DIM - 1] = float("nan")
    return {
        "inner": space.inner(cut(a), cut(b)),
        "norm": space.norm(cut(a)),
        "tiny": space.norm(cut(1e-20 * a).float()),
        "norms": space.norms(cut(a), parts),
        "sums": space.sums(cut(a), parts, cut(b)),
        "coordinates": space.coordinates(here, cut(b)),
        "products": space.products(here, cut(random(DIM, 2))),
        "spans": space.products(here, space.orthonormal(cut(rows.T @ random(4, 4)))).det().abs(),
        "extent": space.extent(cut(a)),
        "largest": space.largest(cut(a)),
        "coefficients": coefficients,
        "size": size,
        "left": space.norm(left - cut(a - rows.T @ (rows @ a))),
        "finite": (space.finite(cut(a)), space.finite(cut(holes))),
    }


@pytest.mark.parametrize("size", SIZES)
def test_pieces_answer_as_the_whole_does(size: int) -> None:
    expected = answers(Vectors(DIM), lambda v: v)

    def mine(member: Member) -> dict[str, Any]:
        space = CutVectors(DIM, member)
        assert torch.equal(space.joined(space.cut(random(DIM, 2))), random(DIM, 2))
        return answers(space, space.cut)

    for found in each(size, mine):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
    assert expected["finite"] == (True, False)


def test_entries_that_several_processes_hold_count_once() -> None:
    # Entries 0 to 9 are cut, 10 to 22 lie in both, and the first process answers for them; that
    # they are in the middle of what the second one holds needs ranges.
    expected = answers(Vectors(DIM), lambda v: v)

    def mine(member: Member) -> dict[str, Any]:
        order = [*range(10, 23), *range(6)] if member.rank == 0 else [6, 7, *range(10, 23), 8, 9]
        counted = None if member.rank == 0 else [slice(0, 2), slice(15, 17)]
        space = Pieces(DIM, len(order), member, counted)
        whole = [torch.arange(DIM)[index].tolist() for index in BLOCKS.values()]
        here = [torch.tensor([order.index(i) for i in b if i in order]).long() for b in whole]
        return answers(space, lambda v: v[order], here)

    for found in each(2, mine):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("size", SIZES)
def test_probes_are_the_same_whatever_the_number_of_processes(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "PIECE", 5)
    whole = Vectors(DIM).rademacher(generator(3), dtype=torch.float32, device=CPU)

    def mine(member: Member) -> Tensor:
        source = generator(3)
        space = CutVectors(DIM, member)
        piece = space.rademacher(source, dtype=torch.float32, device=CPU)
        # Whatever is drawn next is the same too.
        assert torch.equal(torch.rand(3, generator=source), following)
        return space.joined(piece)

    source = generator(3)
    Vectors(DIM).rademacher(source, dtype=torch.float32, device=CPU)
    following = torch.rand(3, generator=source)
    for found in each(size, mine):
        assert torch.equal(found, whole)


def test_short_vectors_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "LEAST_CUT", 10)
    kinds = each(2, lambda m: [type(vectors_of(dim, m)) for dim in (9, 10)])
    assert kinds == [[Vectors, CutVectors]] * 2
    assert type(vectors_of(10, None)) is Vectors


class CutDense(SymmetricOperator):
    """A matrix that every process has, by vectors in pieces."""

    def __init__(self, matrix: Tensor, member: Member) -> None:
        space = CutVectors(len(matrix), member)
        super().__init__(len(matrix), matrix.dtype, matrix.device, vectors=space)
        self.matrix = matrix

    def _matmat(self, columns: Tensor) -> Tensor:
        return self.vectors.cut(self.matrix @ self.vectors.joined(columns))


class WholeDense(CutDense):
    def __init__(self, matrix: Tensor) -> None:
        SymmetricOperator.__init__(self, len(matrix), matrix.dtype, matrix.device)
        self.matrix = matrix


def measured(operator: SymmetricOperator) -> tuple[LanczosRun, dict[str, Any]]:
    """Return a Lanczos run and the traces that rest on it."""
    source = generator(1)
    run = lanczos(operator, operator.rademacher(source), 6)
    blocks = {name: operator.vectors.local(index) for name, index in BLOCKS.items()}
    scale = operator.vectors.cut(random(DIM, seed=4))
    estimator = TraceEstimator(operator, blocks, run, scale=scale)
    start = operator.rademacher(source)
    estimator.add_run(lanczos(operator, start, 3), start)
    for _ in range(3):
        estimator.add_probe(source)
    scaled = ScaledOperator(operator, scale.abs(), 0.1)
    top = lanczos(scaled, operator.rademacher(source), 12, rtol=1e-3, which=[-1])
    found = estimator.estimate()
    plain = {
        "values": run.values,
        "residuals": run.residuals,
        "trace": (found.value, found.sem, found.square, found.square_sem),
        "blocks": dict(found.blocks),
        "scaled": found.scaled,
        "top": (top.num_steps, float(top.values[-1])),
    }
    return run, plain


@pytest.mark.parametrize("size", [2, 3])
def test_lanczos_and_traces_in_pieces_are_those_of_one_process(size: int) -> None:
    matrix = spectrum(random(DIM))
    run, expected = measured(WholeDense(matrix))

    def mine(member: Member) -> tuple[Tensor, dict[str, Any]]:
        operator = CutDense(matrix, member)
        run, found = measured(operator)
        # The basis is cut over the processes, and so is all else that is long.
        assert run.basis.shape == (6, operator.vectors.length)
        assert len(run.next_vector) == len(run.first_product) == operator.vectors.length <= 12
        return operator.vectors.joined(run.vectors([0, -1])), found

    for vectors_found, found in each(size, mine):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(vectors_found, run.vectors([0, -1]), rtol=1e-9, atol=1e-11)


class Bowl(nn.Module):
    """A smooth loss of two parameters, a batch each process has a part of."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(random(5, 3)), nn.Parameter(random(3, seed=1))

    def terms(self, rank: int, size: int) -> list[LossTerm]:
        x = random(12, 5, seed=2)

        def term(i: int) -> LossTerm:
            rows = x[i : i + 3]
            return LossTerm(lambda: (rows @ self.w.tanh() + self.b).sigmoid().square().mean(), 0.25)

        return [term(3 * i) for i in range(rank, 4, size)]


def products(operator: LossOperator) -> dict[str, Tensor | float]:
    """Return whatever is long, put together."""
    with operator as hessian:
        join = hessian.vectors.joined
        block = hessian.block(["b"])
        return {
            "loss": hessian.loss,
            "gradient": join(hessian.gradient),
            "product": join(hessian @ hessian.rademacher(generator(0))),
            "columns": join(hessian @ hessian.vectors.cut(random(18, 2))),
            "block": block.vectors.joined(block @ block.rademacher(generator(0))),
            "place": hessian.vectors.norms(hessian.gradient, [hessian.positions(["b"])])[0],
        }


@pytest.mark.parametrize("kind", [HessianOperator, DifferenceOperator])
@pytest.mark.parametrize("size", [2, 4])
def test_a_hessian_in_pieces_is_that_of_one_process(kind: Any, size: int) -> None:
    module = Bowl()
    expected = products(kind(module.terms(0, 1), dict(module.named_parameters())))

    def mine(member: Member) -> dict[str, Tensor | float]:
        own = Bowl()
        terms = own.terms(member.rank, size)
        return products(kind(terms, dict(own.named_parameters()), share=member))

    rtol = 1e-9 if kind is HessianOperator else 1e-6
    for found in each(size, mine):
        torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("size", [2, 3])
def test_eigenvectors_in_pieces_are_those_of_one_process(size: int) -> None:
    def found(operator: LossOperator) -> Any:
        with operator as hessian:
            run = lanczos(hessian, hessian.rademacher(generator(0)), 4)
            return leading_eigenvectors(hessian, run, 3, seed=0)

    module = Bowl()
    expected = found(HessianOperator(module.terms(0, 1), dict(module.named_parameters())))

    def mine(member: Member) -> Any:
        own = Bowl()
        parameters = dict(own.named_parameters())
        return found(HessianOperator(own.terms(member.rank, size), parameters, share=member))

    for one in each(size, mine):
        assert one.settled == expected.settled
        torch.testing.assert_close(one.values, expected.values, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(one.vectors, expected.vectors, rtol=0, atol=1e-6)


@pytest.mark.parametrize("inside", [True, False])
def test_who_fails_takes_the_others_along_wherever_they_wait(inside: bool) -> None:
    def fails(columns: Tensor, chosen: object) -> Tensor:
        raise ValueError("no luck")

    def mine(member: Member) -> None:
        own = Bowl()
        operator = HessianOperator(
            own.terms(member.rank, 2), dict(own.named_parameters()), share=member
        )
        with operator as hessian:
            run = lanczos(hessian, hessian.rademacher(generator(0)), 3)
            if member.rank == 1 and not inside:
                raise ValueError("no luck")
            if member.rank == 1:
                hessian._local_product = fails  # type: ignore[method-assign]
            # Else the other one waits for a product or an inner product meanwhile.
            hessian.vectors.norm(hessian @ run.next_vector)

    for error in together(2, mine):
        assert isinstance(error, MeasurementError)
        assert "process 1 failed" in str(error)

"""The Hessian of a loss as an operator: what every way of multiplying with it shares."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType

import torch
from torch import Tensor

from lla_callbacks.linalg.errors import NonFiniteError, OutOfMemoryError
from lla_callbacks.linalg.loss_term import Differentiated as Differentiated
from lla_callbacks.linalg.loss_term import LossTerm as LossTerm
from lla_callbacks.linalg.loss_term import loss_value as loss_value
from lla_callbacks.linalg.operators import SymmetricOperator
from lla_callbacks.linalg.sharing import Alone, Share, meet, was_told
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.linalg.vectors import Index, Vectors, vectors_of

NOT_FINITE = "a Hessian-vector product is not finite although the loss is."
# A basis of so few bytes is not felt beside Python and torch. Choice.
LEAST_BASIS = 64 * 2**20
# A run is shortened to so many steps at the least: from there on ``LanczosRun.beyond`` held the
# extreme eigenvalue from every start (tests/linalg/test_lanczos.py).
LEAST_STEPS = 10


class LossOperator(SymmetricOperator):
    """The Hessian of ``L = sum_b weight_b L_b`` with respect to named parameters.

    Unused parameters have zero rows. Parameters that appear under two names count once.
    Processes may hold different terms: each product is then one sum over processes, and what one of
    them fails at, all fail at together. For that the operator is a context manager: on leaving, the
    processes tell each other whether all went well. Long vectors are in pieces then, one range of
    entries a process (:class:`~lla_callbacks.linalg.vectors.CutVectors`): what is multiplied is
    put together whole, and of the product each keeps its piece. Where parameters are spread over
    processes (FSDP2, tensor parallelism), vectors lie in their shards, and nothing is put together.

    Args:
        terms: The batches of this process.
        parameters: Name to leaf tensor with ``requires_grad``; the same in every process.
        context: Entered around every forward and backward pass.
        share: The processes.

    Attributes:
        engine: How products are computed, in a word.
        matrix: ``"hessian"``, or ``"ggn"`` for its Gauss-Newton part.
        space: Layout of the flat vectors.
        loss: The loss ``L``, a float.
        room: Bytes that vectors may take on the device; more of them live on the CPU.
        basis_room: Bytes that a basis may take where there is nowhere else to go, beside the
            vectors that are at work.

    Raises:
        NonFiniteError: If a loss, a gradient or a product is not finite.
    """

    engine = "exact"
    matrix = "hessian"
    room = math.inf
    basis_room = math.inf
    # Whether what a process computes is the sum over all processes already.
    is_summed = False

    def __init__(
        self,
        terms: Sequence[LossTerm],
        parameters: Mapping[str, Tensor],
        *,
        context: Callable[[], AbstractContextManager[object]] = nullcontext,
        share: Share | None = None,
    ) -> None:
        self.share: Share = share or Alone()
        if not terms and self.share.size == 1:
            raise ValueError("a Hessian needs at least one batch.")
        self.space = ParameterSpace(parameters)
        super().__init__(
            self.space.dim,
            self.space.dtype,
            self.space.device,
            vectors=self._held(self.space),
        )
        self.eps = torch.finfo(self.space.precision).eps
        self._terms = list(terms)
        self._context = context
        self._released = False
        self._known: list[tuple[Tensor, Tensor]] = []
        self._follows = False
        # All who take part in a product.
        self._everyone = self.share if self.share.size > 1 else self.vectors.share
        self.loss = 0.0
        self._gradient_now: Tensor | None = None

    @property
    def gradient(self) -> Tensor:
        """The gradient, as vectors are held."""
        if self._gradient_now is None:
            self._gradient_now = self._together(self._gradient_again, "gradient, again")
        return self._gradient_now

    def save_memory(self) -> None:
        """Hold less from here on, for where memory is tight; all processes, or none.

        The gradient is given up until it is asked for, which computes it again, to the bit.
        """
        self._gradient_now = None

    @abstractmethod
    def _gradient_again(self) -> Tensor:
        """Return this process's summand of the gradient once more."""

    def block(self, names: Sequence[str]) -> HessianBlockOperator:
        """Return the Hessian of some parameters alone."""
        return HessianBlockOperator(self, names)

    def positions(self, names: Sequence[str]) -> Index:
        """Return where the entries of some parameters are in vectors, as these are held."""
        return self.vectors.local(self.space.place(names))

    def weight_norm(self) -> float:
        """Return the Euclidean norm of the parameters."""
        weights = self.space.flatten(self.space.tensors)
        return self.space.vectors(self.share).norm(weights)

    def whole(self, columns: Tensor) -> Tensor:
        """Return vectors ``(length, k)`` with all their entries, ``(dim, k)``; some exchanges."""
        columns = self.vectors.joined(columns)
        if not self.space.is_spread:
            return columns
        return torch.stack([self.space.gathered(column) for column in columns.T], dim=1)

    def _held(self, space: ParameterSpace) -> Vectors:
        """Return how vectors are held: in the parameters' shards, cut, or whole."""
        if space.is_spread:
            return space.vectors(self.share)
        return vectors_of(space.dim, self.share)

    def basis_device(self, num_vectors: int) -> torch.device:
        """Return where so many vectors should live."""
        size = num_vectors * self.vectors.length * self.dtype.itemsize
        return self.device if size <= self.room else torch.device("cpu")

    def keeps_half(self, num_vectors: int) -> bool:
        """Return whether a basis of so many vectors is kept in half of its memory.

        On a CPU, where it would not fit, and is not small beside the process itself. All processes
        come to the same decision.
        """
        if self.device.type != "cpu" or self.dtype != torch.float32:
            return False
        size = num_vectors * self.dtype.itemsize
        if size * -(-self.shape[0] // self._everyone.size) <= LEAST_BASIS:
            return False
        fits = size * self.vectors.length <= self.basis_room
        if self._everyone.size == 1:
            return not fits
        refusals = torch.tensor([float(not fits)], dtype=torch.float64)
        return float(self._everyone.total(refusals)[0]) > 0

    def affordable_steps(self, num_steps: int, num_runs: int = 1) -> int:
        """Return how many of these steps there is memory for, :data:`LEAST_STEPS` at least.

        Of several processes each has its part of a basis, and none is shortened.
        """
        if self._everyone.size > 1 or not self.keeps_half(num_steps * num_runs):
            return num_steps
        a_step = num_runs * self.vectors.length * self.dtype.itemsize / 2
        fitting = int(max(self.basis_room, LEAST_BASIS) / a_step)
        return min(num_steps, max(LEAST_STEPS, fitting))

    def product(
        self, columns: Tensor, chosen: Sequence[int], vectors: Vectors | None = None
    ) -> Tensor:
        """Return the product restricted to the chosen parameters, both sides.

        Args:
            columns: ``(size, k)``, where ``size`` counts the chosen parameters' elements, in this
                process's pieces.
            chosen: Positions of parameters in ``space.names``, ascending.
            vectors: How vectors of the chosen parameters are held; ``None``: as those of all are.
        """
        if self._released:
            raise RuntimeError("this operator was released; build a new one.")
        vectors = vectors or self.vectors
        whole = vectors.joined(columns)
        total = self._together(lambda: self._local_product(whole, chosen), "product", vectors)
        if not vectors.finite(total):
            raise NonFiniteError(
                NOT_FINITE,
                "Look for a function whose second derivative diverges (sqrt, norm or log "
                "at zero) in the model.",
            )
        return total

    def release(self) -> None:
        """Drop what the operator holds; it cannot multiply any more."""
        self._terms, self._released, self._known = [], True, []

    def engine_error(self, vector: Tensor, product: Tensor) -> Tensor:
        """Return an estimate of how far a product is from exact.

        Args:
            vector: ``v``, as vectors are held.
            product: The operator's own ``H v``.
        """
        return torch.zeros_like(product)

    def __enter__(self) -> LossOperator:
        """Begin to multiply."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release the operator, and tell the other processes whether all went well here.

        Raises:
            MeasurementError: If another process failed.
        """
        self.release()
        trouble = error if isinstance(error, Exception) else None
        if self._everyone.size == 1 or was_told(trouble):
            return
        if error is not None and trouble is None:
            # The run is being ended, here and by Lightning in the others.
            return
        meet(self._everyone, "end of a Hessian", trouble)

    @abstractmethod
    def _local_product(self, columns: Tensor, chosen: Sequence[int]) -> Tensor:
        """Return this process's summand of a product."""

    def remember(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Keep vectors with their products, each for the next time it is asked for."""
        self._known, self._follows = list(pairs), False

    def _matmat(self, columns: Tensor) -> Tensor:
        if columns.shape[1] == 1:
            for i, (vector, product) in enumerate(self._known):
                if self.vectors.agreed(torch.equal(vector, columns[:, 0])):
                    del self._known[i]
                    self._follows = True
                    return product[:, None]
            if self._follows:
                # The run that it is for goes another way, as one with a rounded basis does.
                self._known = []
        return self.product(columns, range(len(self.space.tensors)))

    def _together(
        self, compute: Callable[[], Tensor], what: str, vectors: Vectors | None = None
    ) -> Tensor:
        """Return the sum over processes of what each computes, as vectors are held.

        Raises:
            Exception: If any process fails, in all.
        """
        if self._everyone.size == 1:
            return compute()
        part, trouble = torch.empty(0), None
        try:
            part = compute()
        except Exception as error:  # noqa: BLE001 - raised again, in all processes
            trouble = error
        meet(self._everyone, what, trouble)
        return part if self.is_summed else (vectors or self.vectors).summed(part, self.share)

    @contextmanager
    def _differentiating(self) -> Iterator[None]:
        with torch.inference_mode(False), torch.enable_grad(), self._context():
            yield

    def _begin(self, compute: Callable[[], tuple[float, Tensor]]) -> None:
        """Set loss and gradient, those of all processes together.

        Raises:
            NonFiniteError: If one of them is not finite.
        """
        losses: list[float] = []

        def gradient() -> Tensor:
            loss, found = compute()
            losses.append(loss)
            return found

        found = self._gradient_now = self._together(gradient, "gradient")
        self.loss = losses[0]
        if self.share.size > 1:
            mine = torch.tensor(losses, dtype=torch.float64)
            self.loss = float(self.share.total(mine)[0])
        if not self.vectors.finite(found):
            raise NonFiniteError(
                "the gradient of the loss is not finite.",
                "Look for a division by zero or an overflow in the model at these weights.",
            )

    def _halve(self, i: int, error: Exception) -> None:
        """Replace a term by two of half its samples, where that is possible.

        Raises:
            OutOfMemoryError: If it is not.
        """
        halves = self._terms[i].halves
        if halves is None:
            raise OutOfMemoryError(
                f"there is not enough memory for one batch ({error}).",
                "Lower num_samples or num_steps, or give a dataloader of smaller batches."
                + (
                    " Or set engine='difference', which needs no more than a training step."
                    if self.engine == "exact"
                    else ""
                ),
            ) from error
        self._terms[i : i + 1] = halves()


class HessianBlockOperator(SymmetricOperator):
    """The Hessian of some parameters alone: a principal block, cheaper than the whole.

    Only the block's gradients are differentiated, and only towards the block, so that a
    product never walks parts of the graph that do not matter.

    Args:
        hessian: The operator whose graphs are used.
        names: Parameters of the block.
    """

    def __init__(self, hessian: LossOperator, names: Sequence[str]) -> None:
        if not names:
            raise ValueError("a block needs at least one parameter.")
        own = hessian.space.restricted(names)
        super().__init__(
            own.dim,
            hessian.dtype,
            hessian.device,
            vectors=hessian._held(own),
        )
        self.eps = hessian.eps
        self._hessian = hessian
        self._chosen = [i for i, name in enumerate(hessian.space.names) if name in set(names)]

    def basis_device(self, num_vectors: int) -> torch.device:
        """Return where so many vectors of the block should live."""
        whole = self._hessian.shape[0]
        return self._hessian.basis_device(-(-num_vectors * self.shape[0] // whole))

    def keeps_half(self, num_vectors: int) -> bool:
        """Return whether a basis of so many vectors of the block is kept in half of its memory."""
        whole = self._hessian.shape[0]
        return self._hessian.keeps_half(-(-num_vectors * self.shape[0] // whole))

    def _matmat(self, columns: Tensor) -> Tensor:
        return self._hessian.product(columns, self._chosen, self.vectors)

"""The Hessian of any module as an operator that is multiplied with, without a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lla_callbacks.linalg.distributed import whole as whole_of
from lla_callbacks.linalg.errors import MeasurementError, forgetful
from lla_callbacks.linalg.loss_operator import LossOperator
from lla_callbacks.linalg.operators import SymmetricOperator
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.objective.build import objective_of
from lla_callbacks.objective.checks import MOST_WORK, module_of, whole
from lla_callbacks.objective.counting import BatchSize
from lla_callbacks.objective.engines import (
    engines_of,
    is_for_differences,
    prove_engine,
    raise_last,
)
from lla_callbacks.objective.evaluation import Loss
from lla_callbacks.objective.gauss_newton import Matrix
from lla_callbacks.objective.objective import Engine, Mode, Objective
from lla_callbacks.objective.parts import Parameters
from lla_callbacks.objective.precision import Precision, at_precision, check_precision
from lla_callbacks.objective.self_check import Jacobian
from lla_callbacks.objective.spelling import spelled

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

NAMES = {"hessian": "Hessian", "ggn": "Gauss-Newton part of the Hessian"}


class CurvatureOperator(SymmetricOperator):
    """What :func:`~lla_callbacks.hessian_operator` returns: a matrix known by its products.

    ``operator @ v`` takes and returns vectors of shape ``(n,)`` or blocks ``(n, k)`` of
    :attr:`dtype` on :attr:`device`; ``n`` counts the entries of all measured parameters, one after
    the other. It is the matrix at the weights of the moment it was made: once they move, products
    are refused. The graphs of the batches stay in memory between products; :meth:`release`, or
    leaving a ``with`` block, drops them.

    Attributes:
        shape: ``(n, n)``.
        dtype: float64 if a parameter is, else float32.
        device: That of the parameters.
        names: Parameters in the order of the vector.
        num_matvecs: Products so far, one a column.
        engine_reason: Why products are not exact; empty if they are.

    Example::

        >>> import torch
        >>> from lla_callbacks import hessian_operator
        >>> def loss(module, batch):
        ...     return module(batch).square().mean()
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> H = hessian_operator(net, [torch.eye(2)], loss=loss)
        >>> H.shape, H @ torch.tensor([1.0, 2.0])
        ((2, 2), tensor([1., 2.]))
    """

    def __init__(
        self,
        objective: Objective,
        copies: dict[int, Tensor],
        *,
        chunk_size: int,
    ) -> None:
        self._objective = objective
        self._copies = copies
        self._chunk_size = chunk_size
        self._inner: LossOperator | None = None
        own = ParameterSpace(objective.variables)
        self._weights = own.flatten(own.tensors)
        with self._at_precision():
            engines, self.engine_reason = objective.without_skipped(lambda: engines_of(objective))
            self._engines: list[Engine] = list(engines)
            inner: LossOperator = self._attempt(lambda found: found)
        super().__init__(inner.shape[0], inner.dtype, inner.device)
        self.eps = inner.eps
        self._space = inner.space
        self.names = inner.space.names

    @property
    def engine(self) -> Engine:
        """How products are computed: ``"exact"`` or ``"difference"``."""
        return self._engines[0]

    @property
    def matrix(self) -> str:
        """``"hessian"`` or ``"ggn"``."""
        return self._present.matrix

    @property
    def loss(self) -> float:
        """The loss on the batches."""
        return self._present.loss

    @property
    def gradient(self) -> Tensor:
        """The gradient of the loss, shape ``(n,)``."""
        return self._space.gathered(self._present.gradient)

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return one vector ``(n,)`` of tensors by parameter name; names left out are zeros.

        Raises:
            ValueError: If a name is none of the parameters, or a shape is not its own.
        """
        unknown = [name for name in tensors if name not in self.names]
        if unknown:
            raise ValueError(
                f"tensors has {', '.join(map(repr, unknown))}; give names among "
                f"{', '.join(self.names)}."
            )
        likes = dict(zip(self.names, self._space.tensors, strict=True))
        for name, tensor in tensors.items():
            if tensor.shape != likes[name].shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}; give {tuple(likes[name].shape)}."
                )
        space = self._space
        parts = [
            torch.zeros(likes[name].numel(), dtype=space.dtype, device=space.device)
            if name not in tensors
            else whole_of(tensors[name].detach()).reshape(-1).to(space.device, space.dtype)
            for name in self.names
        ]
        return torch.cat(parts)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Return a vector ``(n,)`` as tensors by parameter name, shaped as the parameters are."""
        if vector.shape != (self.shape[0],):
            raise ValueError(
                f"vector has shape {tuple(vector.shape)}; give ({self.shape[0]},), one column."
            )
        return {
            name: part.reshape(like.shape)
            for name, like, part in zip(
                self.names,
                self._space.tensors,
                torch.split(vector, [like.numel() for like in self._space.tensors]),
                strict=True,
            )
        }

    def to_scipy(self) -> LinearOperator:
        """Return the same as a ``scipy.sparse.linalg.LinearOperator``, for ``eigsh`` and its like.

        Raises:
            ImportError: If scipy is not installed.
        """
        try:
            from scipy.sparse.linalg import LinearOperator
        except ImportError as error:
            raise ImportError("to_scipy needs scipy: pip install scipy.") from error

        def product(columns: Any) -> Any:
            given = torch.as_tensor(columns).to(self.device, self.dtype)
            return (self @ given).cpu().numpy()

        kind = str(self.dtype).removeprefix("torch.")
        # A symmetric matrix is its own adjoint.
        return LinearOperator(
            self.shape, matvec=product, matmat=product, rmatvec=product, rmatmat=product, dtype=kind
        )

    def release(self) -> None:
        """Drop graphs and batches; the operator cannot multiply any more."""
        self._present.release()

    def __enter__(self) -> CurvatureOperator:
        return self

    def __exit__(self, *args: object) -> None:
        self.release()

    def __repr__(self) -> str:
        return (
            f"<CurvatureOperator: {NAMES[self.matrix]} of {self.shape[0]:,} parameters on "
            f"{self._objective.num_samples:,} samples, {self.engine} products, {self.dtype}>"
        )

    def _matmat(self, columns: Tensor) -> Tensor:
        own = ParameterSpace(self._objective.variables)
        if own.length != self._weights.numel() or not torch.equal(
            own.flatten(own.tensors), self._weights
        ):
            raise RuntimeError(
                "the weights have moved since this operator was made, and it is the Hessian at "
                "those of then: make a new one by hessian_operator."
            )
        with self._at_precision():
            product: Tensor = self._attempt(lambda inner: _multiplied(inner, columns))
        return product

    @property
    def _present(self) -> LossOperator:
        assert self._inner is not None
        return self._inner

    def _at_precision(self) -> Any:
        objective = self._objective
        return at_precision(objective.module, objective.precision, self._copies)

    def _attempt(self, use: Callable[[LossOperator], Any]) -> Any:
        """Use the operator, by the next engine where one fails."""
        while True:
            failed: Exception
            try:
                return use(self._opened())
            except MeasurementError as error:
                if len(self._engines) == 1 or not is_for_differences(error):
                    raise_last(error, self.engine_reason)
                failed = forgetful(error)
            if self._inner is not None:
                self._inner.release()
            self._inner = None
            del self._engines[0]
            self.engine_reason = f"{type(failed).__name__}: {failed}"

    def _opened(self) -> LossOperator:
        if self._inner is None:
            objective = self._objective
            inner = objective.without_skipped(
                lambda: objective.hessian(chunk_size=self._chunk_size, engine=self.engine)
            )
            prove_engine(objective, inner)
            self._inner = inner
        return self._inner


def _multiplied(inner: LossOperator, columns: Tensor) -> Tensor:
    """Return the product with whole vectors ``(n, k)``, also where parameters are spread."""
    if not inner.space.is_spread:
        return inner @ columns
    parts = torch.stack([inner.space.scattered(column) for column in columns.T], dim=1)
    return inner.whole(inner @ parts)


@spelled
def hessian_operator(
    module: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    mode: Mode = "batch",
    dropout: bool = False,
    parameters: Parameters = None,
    matrix: Matrix = "hessian",
    num_samples: int | None = None,
    microbatch_size: int | None = None,
    max_memory: int | None = None,
    engine: Engine = "auto",
    precision: Precision = "float32",
    chunk_size: int = 1,
    check: bool = True,
    jacobian: Jacobian = "gap",
    seed: int = 0,
    batch_size: BatchSize = None,
) -> CurvatureOperator:
    """Return the Hessian at the present weights, to be multiplied with vectors.

    The same matrix that :func:`~lla_callbacks.measure_hessian` measures, with the same promises:
    the loss is the module's own, and the module is left exactly as it was, between products too. A
    product costs about two gradients.

    Args:
        module: Any module; a LightningModule needs no ``loss``.
        batches: Any iterable of batches; copies are held on the CPU.
        loss: ``loss(module, batch)``; ``None`` replays ``training_step``.
        mode: ``"batch"``, ``"eval"`` or ``"recalibrate"``, as of
            :func:`~lla_callbacks.measure_hessian`, and likewise all below.
        dropout: Whether dropout is on.
        parameters: Which parameters' Hessian: ``None`` takes all that are trained; shell patterns
            of their names (``"generator.*"``), or of modules; or a predicate ``(name, parameter)
            -> bool``. The others stay where they are.
        matrix: ``"hessian"``, or ``"ggn"`` for its Gauss-Newton part.
        num_samples: Take batches until they have this many samples; ``None`` takes all.
        microbatch_size: Evaluate batches in parts of at most this many samples.
        max_memory: Bytes that graphs may take.
        engine: ``"exact"``, ``"difference"`` or ``"auto"``.
        precision: ``"float32"`` or ``"training"``.
        chunk_size: Vectors of a block in one backward pass.
        check: Whether the loss proves itself first.
        jacobian: ``"gap"`` or ``"measure"``, where the gradient is no derivative of the loss.
        seed: Fixes whatever is random in the loss.
        batch_size: How many samples a batch has, where it does not tell.

    Raises:
        ValueError: If a setting is not allowed; the message says what is.
        TypeError: If there is neither a loss nor a replayable ``training_step``.
        MeasurementError: If the loss is not finite or has no second derivative; the message
            holds the remedy.
    """
    chunk_size = whole("chunk_size", chunk_size, 1, MOST_WORK)
    module_of("module", module)
    check_precision(precision)
    copies: dict[int, Tensor] = {}
    with at_precision(module, precision, copies):
        objective = objective_of(
            module,
            batches,
            loss,
            mode=mode,
            dropout=dropout,
            seed=seed,
            num_samples=num_samples,
            microbatch_size=microbatch_size,
            max_memory=max_memory,
            engine=engine,
            precision=precision,
            check=check,
            jacobian=jacobian,
            batch_size=batch_size,
            matrix=matrix,
            parameters=parameters,
        )
    return CurvatureOperator(objective, copies, chunk_size=chunk_size)

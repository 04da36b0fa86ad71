"""The contract of a symmetric operator, and the operators that need no model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from lla_callbacks.linalg.vectors import Vectors


class SymmetricOperator(ABC):
    """A symmetric matrix that is known only through its products ``A @ v``.

    Products take a vector of shape ``(dim,)`` or a block of shape ``(dim, k)`` and return
    the same shape. Every column counts as one product in :attr:`num_matvecs`.

    Where vectors are in pieces, these are the pieces of this process, ``(length,)`` and
    ``(length, k)``, and products are of all processes together.

    Args:
        dim: Number of rows.
        dtype: float32 or float64; the dtype in which vectors are stored.
        device: Where vectors live.
        vectors: How they are held; ``None``: whole.

    Attributes:
        vectors: How vectors are held: inner products and norms of them.
        eps: Relative rounding of a product's arithmetic.
        listener: Called with the number of products after each call, for progress bars.
    """

    def __init__(
        self,
        dim: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        vectors: Vectors | None = None,
    ) -> None:
        self.shape = (dim, dim)
        self.vectors = Vectors(dim) if vectors is None else vectors
        self.dtype = dtype
        self.device = device
        self.eps = torch.finfo(dtype).eps
        self.num_matvecs = 0
        self.listener: Callable[[int], object] | None = None

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Return ``A @ vectors``, shape ``(dim,)`` or ``(dim, k)``.

        Raises:
            ValueError: If the number of rows is not ``dim``.
        """
        length = self.vectors.length
        if vectors.ndim not in (1, 2) or vectors.shape[0] != length:
            raise ValueError(
                f"cannot multiply an operator of shape {self.shape} with a tensor of "
                f"shape {tuple(vectors.shape)}: give ({length},) or ({length}, k)."
            )
        # Without entries, a shape does not follow from the others.
        width = vectors.shape[1] if vectors.ndim == 2 else 1
        columns = vectors.reshape(length, width).to(self.device, self.dtype)
        product = self._matmat(columns) if columns.shape[1] else columns.clone()
        self.num_matvecs += columns.shape[1]
        if self.listener is not None:
            self.listener(columns.shape[1])
        return product.reshape(vectors.shape)

    def rademacher(self, source: torch.Generator) -> Tensor:
        """Return random signs to be multiplied with, the same in whatever pieces they are."""
        return self.vectors.rademacher(source, dtype=self.dtype, device=self.device)

    def to_dense(self) -> Tensor:
        """Return the matrix itself, ``(dim, dim)``, at the price of ``dim`` products."""
        return self @ torch.eye(self.shape[0], dtype=self.dtype, device=self.device)

    @abstractmethod
    def _matmat(self, columns: Tensor) -> Tensor:
        """Return the product with ``columns`` of shape ``(dim, k)``, ``k >= 1``."""


class DenseOperator(SymmetricOperator):
    """A symmetric matrix of shape ``(dim, dim)`` held in memory."""

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"a square matrix is needed, not {tuple(matrix.shape)}.")
        super().__init__(matrix.shape[0], matrix.dtype, matrix.device)
        self.matrix = matrix

    def _matmat(self, columns: Tensor) -> Tensor:
        return self.matrix @ columns


class ScaledOperator(SymmetricOperator):
    """``D^(1/2) A D^(1/2) + shift``, for a preconditioner that is a diagonal ``D >= 0``.

    It has the eigenvalues of ``D A`` (plus the shift), but stays symmetric, so that
    Lanczos applies to it.

    Args:
        operator: ``A``.
        diagonal: ``D``, held as vectors are, nowhere negative.
        shift: Diagonal that is added to ``A`` before scaling, likewise, or a number.
    """

    def __init__(
        self, operator: SymmetricOperator, diagonal: Tensor, shift: Tensor | float = 0.0
    ) -> None:
        length = operator.vectors.length
        if diagonal.shape != (length,) or bool((diagonal < 0).any()):
            raise ValueError(
                f"the diagonal must have shape ({length},) and no negative entry; its shape is "
                f"{tuple(diagonal.shape)}."
            )
        super().__init__(
            operator.shape[0], operator.dtype, operator.device, vectors=operator.vectors
        )
        self.eps = operator.eps
        self.operator = operator
        self._root = diagonal.to(operator.device, operator.dtype).sqrt()[:, None]
        self._shift = torch.as_tensor(shift, dtype=self.dtype, device=self.device)
        if self._shift.ndim == 1:
            self._shift = self._shift[:, None]

    def _matmat(self, columns: Tensor) -> Tensor:
        scaled = self._root * columns
        return self._root * (self.operator @ scaled + self._shift * scaled)

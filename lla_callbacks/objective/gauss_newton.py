"""A loss of which the Gauss-Newton part is measured in the place of the Hessian."""

from __future__ import annotations

import copy
from typing import Any, Literal

from lla_callbacks.linalg.errors import MeasurementError
from lla_callbacks.linalg.gauss_newton import GaussNewtonOperator
from lla_callbacks.linalg.loss_operator import LossOperator
from lla_callbacks.linalg.sharing import Alone, Share, all_or_none
from lla_callbacks.objective.checks import one_of
from lla_callbacks.objective.criteria import heard
from lla_callbacks.objective.objective import Engine, Objective
from lla_callbacks.objective.sharded import is_sharded

Matrix = Literal["hessian", "ggn"]


class GaussNewtonObjective(Objective):
    """An objective whose curvature is the Gauss-Newton matrix of its criteria.

    Args:
        given: As :class:`~lla_callbacks.objective.objective.Objective` takes it.

    Raises:
        ValueError: If differences of gradients are asked for, which see the whole Hessian.
    """

    def __init__(self, *given: Any, **settings: Any) -> None:
        super().__init__(*given, **settings)
        check_matrix("ggn", self.engine)

    def of_hessian(self) -> Objective:
        """Return the same loss with the whole Hessian as its curvature."""
        plain = copy.copy(self)
        plain.__class__ = Objective  # type: ignore[assignment]
        return plain

    @property
    def engines(self) -> tuple[Literal["exact", "difference"], ...]:
        """Products are exact, or there are none."""
        return ("exact",)

    def hessian(
        self, *, chunk_size: int = 1, engine: Engine | None = None, share: Share | None = None
    ) -> LossOperator:
        """Return the Gauss-Newton matrix at the present weights; see the base class."""
        share = share or Alone()
        if is_sharded(self.module):
            raise MeasurementError(
                "matrix='ggn' needs whole parameters, and these are sharded.",
                "Take matrix='hessian', or measure a checkpoint in a plain module.",
            )
        terms = all_or_none(
            share,
            lambda: self.plan.terms(share, "exact", self.context, self.statistics(), sharded=False),
        )
        return self._finished(
            GaussNewtonOperator(
                terms, self.variables, heard=heard, context=self.context, share=share
            )
        )


def check_matrix(matrix: Any, engine: Engine = "auto") -> Matrix:
    """Return which matrix is measured.

    Raises:
        ValueError: If there is no such matrix, or not by that engine.
    """
    wanted: Matrix = one_of("matrix", matrix, Matrix)
    if wanted == "ggn" and engine == "difference":
        raise ValueError(
            "engine is 'difference' beside matrix='ggn', and differences of gradients see the "
            "whole Hessian; give engine='auto' or 'exact'."
        )
    return wanted

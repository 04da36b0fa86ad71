"""Watch the curvature of the loss while a network trains: callbacks for PyTorch Lightning."""

from lla_callbacks.alignment.functions import Alignment, aligned
from lla_callbacks.callbacks.bundles import economy, paper, standard
from lla_callbacks.callbacks.fast_geometric_ensembling import FastGeometricEnsembling
from lla_callbacks.callbacks.hessian_monitor import HessianMonitor
from lla_callbacks.callbacks.landscape_monitor import LossLandscapeMonitor
from lla_callbacks.callbacks.mode_connection import ModeConnection
from lla_callbacks.callbacks.monitor import Monitor
from lla_callbacks.callbacks.poisoned_loss import PoisonedLoss
from lla_callbacks.callbacks.trace_regularizer import HessianTraceRegularizer
from lla_callbacks.curves.curve import Curve
from lla_callbacks.curves.functions import barrier, connect, loss_curve
from lla_callbacks.curves.report import Barriers, LossCurve
from lla_callbacks.hessian.functions import measure_hessian
from lla_callbacks.hessian.operator import CurvatureOperator, hessian_operator
from lla_callbacks.hessian.quantity import Spectrum
from lla_callbacks.hessian.report import HessianReport
from lla_callbacks.linalg.errors import MeasurementError
from lla_callbacks.minima.functions import (
    compare_basins,
    map_of_minima,
    measure_shift,
    relax,
)
from lla_callbacks.minima.results import BasinComparison, MinimaMap, Relaxation, ShiftReport
from lla_callbacks.objective.moment import Moment
from lla_callbacks.page.film import animate
from lla_callbacks.penalty.reversed import reversed_binary_cross_entropy, reversed_cross_entropy
from lla_callbacks.report.compare import compare
from lla_callbacks.report.quantity import Quantity
from lla_callbacks.report.result import Result
from lla_callbacks.slices.basin_functions import basin_radii, convexity_map
from lla_callbacks.slices.functions import loss_line, loss_plane
from lla_callbacks.slices.quantity import Slices
from lla_callbacks.slices.report import LandscapeReport
from lla_callbacks.slices.results import BasinRadii, ConvexityMap, LossLine, LossPlane
from lla_callbacks.slices.segment_functions import interpolate
from lla_callbacks.version import __version__

__all__ = [
    "Alignment",
    "Barriers",
    "BasinComparison",
    "BasinRadii",
    "ConvexityMap",
    "CurvatureOperator",
    "Curve",
    "FastGeometricEnsembling",
    "HessianMonitor",
    "HessianReport",
    "HessianTraceRegularizer",
    "LandscapeReport",
    "LossCurve",
    "LossLandscapeMonitor",
    "LossLine",
    "LossPlane",
    "MeasurementError",
    "MinimaMap",
    "ModeConnection",
    "Moment",
    "Monitor",
    "PoisonedLoss",
    "Quantity",
    "Relaxation",
    "Result",
    "ShiftReport",
    "Slices",
    "Spectrum",
    "__version__",
    "aligned",
    "animate",
    "barrier",
    "basin_radii",
    "compare",
    "compare_basins",
    "connect",
    "convexity_map",
    "economy",
    "hessian_operator",
    "interpolate",
    "loss_curve",
    "loss_line",
    "loss_plane",
    "map_of_minima",
    "measure_hessian",
    "measure_shift",
    "paper",
    "relax",
    "reversed_binary_cross_entropy",
    "reversed_cross_entropy",
    "standard",
]

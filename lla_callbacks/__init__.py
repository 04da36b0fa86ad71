"""Watch the curvature of the loss while a network trains: callbacks for PyTorch Lightning."""

from lla_callbacks.callbacks.bundles import economy, paper, standard
from lla_callbacks.callbacks.hessian_monitor import HessianMonitor
from lla_callbacks.callbacks.trace_regularizer import HessianTraceRegularizer
from lla_callbacks.functions import measure_hessian
from lla_callbacks.linalg.errors import MeasurementError
from lla_callbacks.report.hessian_report import HessianReport
from lla_callbacks.version import __version__

__all__ = [
    "HessianMonitor",
    "HessianReport",
    "HessianTraceRegularizer",
    "MeasurementError",
    "__version__",
    "economy",
    "measure_hessian",
    "paper",
    "standard",
]

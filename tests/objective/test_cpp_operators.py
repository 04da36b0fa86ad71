"""Operators in C++: measured by differences where their second derivative is lost.

They take ten seconds to compile: ``make test-cpp`` does. ``tests/kinds.py`` has operators whose
kernels are registered in the same way from Python.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lla_callbacks import measure_hessian
from lla_callbacks.linalg.errors import NoSecondDerivativeError
from tests.kinds import Calling, cross_entropy, dense_by_differences, vectors

pytestmark = pytest.mark.skipif(
    "LLA_CPP" not in os.environ or shutil.which("g++") is None,
    reason="needs LLA_CPP=1 and a compiler",
)
SOURCE = Path(__file__).with_name("operators.cpp")


@pytest.fixture(scope="module")
def operators(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch_folder = Path(torch.__file__).parent
    library = tmp_path_factory.mktemp("cpp") / "operators.so"
    include = torch_folder / "include"
    subprocess.run(
        ["g++", "-w", "-O0", "-shared", "-fPIC", "-std=c++20", f"-I{include}",
         f"-I{include / 'torch/csrc/api/include'}", f"-L{torch_folder / 'lib'}", str(SOURCE),
         "-o", str(library), "-ltorch", "-ltorch_cpu", "-lc10"],
        check=True,
    )  # fmt: skip
    torch.ops.load_library(str(library))
    return torch.ops.lla_cpp


def measured(operator: Callable[..., Any], **settings: Any) -> tuple[Any, float]:
    torch.manual_seed(1)
    module, batch = Calling(operator).double(), vectors()
    dense = dense_by_differences(module, [batch], cross_entropy, "batch")
    found = measure_hessian(
        module, [batch], loss=cross_entropy, num_steps=35, num_probes=2, **settings
    )
    return found, float(torch.linalg.eigvalsh(dense)[-1])


@pytest.mark.filterwarnings("ignore:lla_cpp.*an autograd kernel was not registered")
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    ("name", "engine"),
    [("by_graph", "exact"), ("by_kernel", "difference"), ("by_operator", "difference")],
)
def test_an_operator_is_measured_by_the_engine_that_can(
    operators: Any, name: str, engine: str, check: bool
) -> None:
    operator = getattr(operators, name)
    found, top = measured(operator, check=check)
    assert found.engine == engine
    assert float(found.lambda_max) == pytest.approx(top, abs=1e-6)
    if engine == "difference":
        with pytest.raises(NoSecondDerivativeError, match=r"Give loss=|engine='difference'"):
            measured(operator, check=check, engine="exact")


def test_one_that_detaches_what_it_saved_is_found_by_the_self_check(operators: Any) -> None:
    found, top = measured(operators.by_detached)
    assert found.engine == "difference"
    assert float(found.lambda_max) == pytest.approx(top, abs=1e-6)


@pytest.mark.filterwarnings("ignore:lla_cpp.*an autograd kernel was not registered")
def test_one_without_any_derivative_makes_no_hessian(operators: Any) -> None:
    found, _ = measured(operators.alone)
    assert "lambda_max" in found.gaps
    assert "Jacobian" in found.summary()

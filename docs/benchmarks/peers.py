"""How much do other tools spend on what one ``measure_hessian`` call reports?

Run: ``pip install -e ".[peers]"``, remove torchvision if it does not match the torch build, then
``OMP_WAIT_POLICY=PASSIVE python docs/benchmarks/peers.py --data FOLDER`` (20 to 30 minutes
on two cores; spinning threads would ruin every time where cores are shared). FOLDER holds
``cifar10/`` and ``pretrained/``. The report is: both extreme eigenvalues with residuals of at
most 1 % of the largest, the trace with the standard error that ours reached, and a spectral
density from one start vector and 30 Lanczos steps. Peers get the settings that need the fewest
products for it; those are searched for beforehand, which is not charged to them.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import ResNet20, SmallTransformer, cifar10, digits, mlp
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from trace_estimators import pool_of, train

from lla_callbacks import measure_hessian
from lla_callbacks.linalg.hessian import HessianOperator
from lla_callbacks.linalg.lanczos import lanczos
from lla_callbacks.linalg.loss_operator import LossTerm
from lla_callbacks.objective.objective import Objective

NETWORKS = ("mlp", "transformer", "resnet20", "resnet20-batch")
TOOLS = ("lla_callbacks", "pyhessian", "curvlinops", "hessian-eigenthings")
RTOL = 0.01  # residuals wanted, as a share of lambda_max
STEPS = 30  # Lanczos steps of the density
PROBES = 15  # trace probes of our run, which sets the accuracy for all
SKETCH = 40  # widest sketch that is tried for Hutch++ and XTrace
Batch = tuple[Tensor, Tensor]


def loss_of(module: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def mode_of(network: str) -> str:
    return "batch" if network.endswith("batch") else "eval"


def load(network: str, data: Path, state: dict[str, Tensor] | None) -> tuple[nn.Module, Batch]:
    """Return a network in its mode, trained (here, unless its state is given), and its batch."""
    torch.manual_seed(0)
    resnet = network.startswith("resnet20")
    module = ResNet20() if resnet else mlp() if network == "mlp" else SmallTransformer()
    batch = cifar10(data / "cifar10", 64) if resnet else digits(512)
    if state is not None:
        module.load_state_dict(state)
    elif resnet:
        path = data / "pretrained" / "resnet20-12fca82f.th"
        saved = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        module.load_state_dict({k.removeprefix("module."): v for k, v in saved.items()})
    else:
        train(module, *batch, 200, 0.1 if network == "mlp" else 0.01)
    return module.train(mode_of(network) == "batch"), batch


def native_operator(module: nn.Module, batch: Batch) -> HessianOperator:
    """Our operator without our normalization."""
    return HessianOperator(
        [LossTerm(lambda: loss_of(module, batch), 1.0)], dict(module.named_parameters())
    )


# --- One operator per tool, with a count of its products. ------------------------------------


def lla_operator(module: nn.Module, batch: Batch, mode: str) -> Any:
    return Objective(module, [batch], loss_of, mode=mode).hessian()  # type: ignore[arg-type]


def pyhessian_operator(module: nn.Module, batch: Batch, mode: str) -> Any:
    from pyhessian import hessian

    if mode == "batch":
        raise NotImplementedError("it always switches the model to eval mode")
    inner = sys.modules["pyhessian.hessian"]
    made = hessian(module, nn.CrossEntropyLoss(), data=batch, cuda=False)  # one batch: graph kept
    made.num_products, plain = 0, sys.modules["pyhessian.utils"].hessian_vector_product

    def counted(*arguments: Any) -> Any:
        made.num_products += 1
        return plain(*arguments)

    inner.hessian_vector_product = counted
    return made


def curvlinops_operator(module: nn.Module, batch: Batch, mode: str, chunk: int = 1) -> Any:
    from curvlinops import HessianLinearOperator

    class Chunked(HessianLinearOperator):
        """Multiplies ``chunk`` columns at once; the original does all, in as much memory."""

        num_products = 0

        def _matmat(self, M: list[Tensor]) -> list[Tensor]:
            self.num_products += M[0].shape[-1]
            parts = zip(*(m.split(chunk, dim=-1) for m in M), strict=True)
            done = [super(Chunked, self)._matmat([p.contiguous() for p in part]) for part in parts]
            return [torch.cat(columns, dim=-1) for columns in zip(*done, strict=True)]

    # Its check of determinism costs two gradients and two products, which we spare it.
    return Chunked(
        module, nn.CrossEntropyLoss(), list(module.parameters()), [batch], check_deterministic=False
    )


def eigenthings_operator(module: nn.Module, batch: Batch, mode: str) -> Any:
    import hessian_eigenthings as he

    class Counted(he.HessianOperator):
        num_products = 0

        def matvec(self, v: Tensor) -> Tensor:
            self.num_products += 1
            return super().matvec(v)

    return Counted(module, [batch], he.supervised_loss(nn.CrossEntropyLoss()))


# --- The report by each tool. Returns numbers, and the eigenvectors that were found. ----------


def report_lla(module: nn.Module, batch: Batch, mode: str, plan: dict[str, Any]) -> dict[str, Any]:
    r = measure_hessian(
        module, [batch], loss=loss_of, mode=mode, num_steps=STEPS, num_probes=PROBES
    )
    extremes = [(float(e), e.residual) for e in (r.lambda_max, r.lambda_min)]
    return {"pairs": extremes, "trace": r.trace, "sem": r.trace_sem, "products": r.num_matvecs}


def report_pyhessian(module: nn.Module, batch: Batch, mode: str, plan: dict[str, Any]) -> Any:
    # Power iteration with just the iterations that reach RTOL (its own stop rule is switched off),
    # and just the probes that reach the standard error. No lambda_min; density() calls torch.eig,
    # which torch no longer has.
    torch.manual_seed(0)
    op = pyhessian_operator(module, batch, mode)
    values, vectors = op.eigenvalues(maxIter=plan["power"], tol=0.0)
    # Where all probes would take longer than the cap, a share of them is run and scaled.
    began, share = time.perf_counter(), plan["pyhessian_probes"]
    samples = op.trace(maxIter=share, tol=-math.inf)
    scale = plan["probes"] / share
    return {
        "pairs": [(values[0], torch.cat([v.reshape(-1) for v in vectors[0]]))],
        "trace": float(np.mean(samples)),
        "sem": float(np.std(samples, ddof=1)) / math.sqrt(plan["probes"]),
        "products": op.num_products + plan["probes"] - share,
        "unspent": (scale - 1) * (time.perf_counter() - began),
    }


def report_curvlinops(module: nn.Module, batch: Batch, mode: str, plan: dict[str, Any]) -> Any:
    import curvlinops

    # The ARPACK call with the fewest products whose residuals are small enough; the density gets
    # its boundaries from there; columns of the trace go through vmap, in chunks that are fastest.
    torch.manual_seed(0)
    op = curvlinops_operator(module, batch, mode, plan["chunk"])
    pairs = arpack(op.to_scipy(), **plan["arpack"])
    bounds = (pairs[1][0], pairs[0][0])
    curvlinops.lanczos_approximate_spectrum(op, STEPS, boundaries=bounds)
    name, count = plan["curvlinops_trace"]
    trace = float(getattr(curvlinops, name)(op, count))
    return {"pairs": pairs, "trace": trace, "sem": None, "products": op.num_products}


def report_eigenthings(module: nn.Module, batch: Batch, mode: str, plan: dict[str, Any]) -> Any:
    import hessian_eigenthings as he

    # Its Lanczos returns as many Ritz pairs as there are steps, so one run serves both ends.
    op, depth = eigenthings_operator(module, batch, mode), plan["depth"]
    found = he.lanczos(op, k=depth, max_iter=depth, which="LA", seed=0)
    he.spectral_density(op, num_runs=1, lanczos_steps=STEPS, seed=1)
    method, count = plan["eigenthings_trace"]
    trace = he.trace(op, num_matvecs=count, method=method, seed=2)
    pairs = [(float(found.eigenvalues[i]), found.eigenvectors[i]) for i in (0, -1)]
    return {
        "pairs": pairs, "trace": trace.estimate, "sem": trace.stderr, "products": op.num_products
    }  # fmt: skip


OPERATORS = dict(
    zip(TOOLS, (lla_operator, pyhessian_operator, curvlinops_operator, eigenthings_operator),
        strict=True)
)  # fmt: skip
REPORTS = dict(
    zip(TOOLS, (report_lla, report_pyhessian, report_curvlinops, report_eigenthings), strict=True)
)


# --- The cheapest settings for each peer. ----------------------------------------------------


def arpack(op: LinearOperator, both: bool, ncv: int, tols: list[float]) -> list[Any]:
    """Return (value, vector) of the largest and the smallest eigenvalue."""
    v0 = np.random.default_rng(0).standard_normal(op.shape[0])
    if both:
        values, vectors = eigsh(op, k=2, which="BE", ncv=ncv, tol=tols[0], v0=v0, maxiter=20)
        return [(float(values[i]), torch.tensor(vectors[:, i]).float()) for i in (1, 0)]
    ends = [
        eigsh(op, k=1, which=which, ncv=ncv, tol=tol, v0=v0, maxiter=20)
        for which, tol in zip(("LA", "SA"), tols, strict=True)
    ]
    return [(float(values[0]), torch.tensor(vectors[:, 0]).float()) for values, vectors in ends]


def relative_residual(op: Any, value: float, vector: Tensor, top: float) -> float:
    vector = vector / vector.norm()
    return float((op @ vector - value * vector).norm()) / top


def cheapest(
    op: HessianOperator, wanted: float, top: float, bottom: float, frobenius: float
) -> dict[str, Any]:
    """Return the settings with which each peer needs the fewest products."""
    plan: dict[str, Any] = {}
    torch.manual_seed(0)  # the start that PyHessian will draw
    v = torch.cat([torch.randn(p.shape).reshape(-1) for p in op.space.tensors])
    for power in range(1, 301):
        v, plan["power"] = v / v.norm(), power
        image = op @ v
        value = float(v @ image)
        if max(float((image - value * v).norm()), abs(value - top)) <= RTOL * top:
            break
        v = image
    v0 = torch.randn(op.shape[0], generator=torch.Generator().manual_seed(0))
    plan["depth"] = lanczos(op, v0, 60, rtol=0.95 * RTOL).num_steps
    exported = LinearOperator(
        op.shape, dtype=np.float64, matvec=lambda v: (op @ torch.tensor(v).reshape(-1)).numpy()
    )
    wide = max(RTOL, min(0.9, RTOL * top / abs(bottom)))  # ARPACK's is relative to the eigenvalue
    best = math.inf
    for both, ncv, tols in [
        *((True, ncv, [wide]) for ncv in (8, 12, 16, 20)),
        (False, 8, [RTOL, wide]),
    ]:
        before = op.num_matvecs
        try:
            pairs = arpack(exported, both, ncv, tols)
        except ArpackNoConvergence:
            continue
        spent = op.num_matvecs - before
        if spent < best and all(relative_residual(op, *p, top) <= RTOL for p in pairs):
            best, plan["arpack"] = spent, {"both": both, "ncv": ncv, "tols": tols}
    # One pool of probes tells the variance of one probe, plain and behind a sketch of each width.
    probes, products = pool_of(op, SKETCH + 60, 7)
    # Its variance is 2 (||H||_F^2 - ||diag H||^2); a sample's is noisy, the tails being heavy.
    plain = min(float((probes * products).sum(0).std()), math.sqrt(2) * frobenius)
    plan["probes"] = max(2, math.ceil((plain / wanted) ** 2))
    basis = torch.linalg.qr(products[:, :SKETCH])[0]
    small, z, hz = basis.T @ (op @ basis), probes[:, SKETCH:], products[:, SKETCH:]
    inside, image = basis.T @ z, basis.T @ hz
    for width in range(2, SKETCH + 1):
        a = inside[:width]
        form = (z * hz).sum(0) - 2 * (a * image[:width]).sum(0)
        deviation = float((form + (a * (small[:width, :width] @ a)).sum(0)).std())
        if deviation <= wanted * math.sqrt(width):
            break
    width = max(width, math.ceil((deviation / wanted) ** 2))
    sketched = [("hutchpp_trace", 3 * width), ("xtrace", 2 * width)]
    plan["curvlinops_trace"] = min(
        [("hutchinson_trace", plan["probes"]), *sketched], key=lambda c: c[1]
    )
    plan["eigenthings_trace"] = min(
        [("hutchinson", plan["probes"]), ("hutch++", 3 * width)], key=lambda c: c[1]
    )
    plan["plain_deviation"] = plain
    return plan


# --- Measuring. ------------------------------------------------------------------------------


def clock(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def flat(found: Any) -> Tensor:
    """The first column of a product, whatever the tool returns."""
    found = found if isinstance(found, Tensor) else torch.cat([t.reshape(-1) for t in found])
    return found if found.ndim == 1 else found[:, 0]


def time_products(
    module: nn.Module, batch: Batch, mode: str, seconds: float
) -> tuple[dict[str, float], dict[str, str]]:
    """Return median seconds of the plain gradient and of a product of each tool, interleaved."""
    calls: dict[str, Callable[[], Any]] = {}
    failures: dict[str, str] = {}
    # The plain gradient: native layers, native attention.
    plain = copy.deepcopy(module)
    v = torch.randn(sum(p.numel() for p in plain.parameters()))
    columns = {k: torch.randn(len(v), k) for k in (4, 16)}
    for block in columns.values():
        block[:, 0] = v
    sizes = [p.numel() for p in plain.parameters()]
    parts = [
        a.reshape(p.shape) for a, p in zip(v.split(sizes), plain.parameters(), strict=True)
    ]  # fmt: skip
    with sdpa_kernel(SDPBackend.MATH):
        native = native_operator(copy.deepcopy(module), batch)
        for tool, make in OPERATORS.items():
            try:
                op = make(copy.deepcopy(module), batch, mode)
                if tool == "pyhessian":
                    hvp = sys.modules["pyhessian.utils"].hessian_vector_product
                    calls[tool] = lambda op=op, hvp=hvp: hvp(op.gradsH, op.params, parts)
                elif tool == "hessian-eigenthings":
                    calls[tool] = lambda op=op: op.matvec(v)
                else:
                    calls[tool] = lambda op=op: op @ v
                if tool == "curvlinops":
                    for k, block in columns.items():
                        wide = curvlinops_operator(copy.deepcopy(module), batch, mode, k)
                        calls[f"curvlinops x{k}"] = lambda wide=wide, block=block: wide @ block
                difference = flat(calls[tool]()) - native @ v
                assert float(difference.norm() / (native @ v).norm()) < 1e-2, f"{tool} differs"
            except (RuntimeError, NotImplementedError) as error:  # that this tool cannot do it
                calls = {name: call for name, call in calls.items() if not name.startswith(tool)}
                failures[tool] = str(error).splitlines()[0].split(". ")[0][:200]
    calls["native"] = lambda: native @ v
    times: dict[str, list[float]] = {name: [] for name in ("gradient", *calls)}
    began = time.perf_counter()
    while len(times["gradient"]) < 4 or time.perf_counter() - began < seconds:
        for _ in range(2):  # twice as often: every ratio depends on it
            times["gradient"].append(
                clock(lambda: torch.autograd.grad(loss_of(plain, batch), list(plain.parameters())))
            )
        for name, call in calls.items():
            with sdpa_kernel(SDPBackend.MATH):
                times[name].append(clock(call) / int(name.partition(" x")[2] or 1))
    # The first round warms up.
    return {name: float(np.median(seen[1:])) for name, seen in times.items()}, failures


def memory(field: str) -> float:
    """Return VmRSS (now) or VmHWM (peak) of this process in MiB.

    ``ru_maxrss`` is of no use here: a process inherits the one of its parent.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def child(tool: str, network: str, data: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Run one tool's report in this fresh process; return its cost and what it found."""
    module, batch = load(network, data, plan.get("state"))
    __import__({"hessian-eigenthings": "hessian_eigenthings"}.get(tool, tool))
    torch.autograd.grad(loss_of(module, batch), list(module.parameters()))
    mode, before, seconds = mode_of(network), memory("VmRSS"), []
    peak = None
    with sdpa_kernel(SDPBackend.MATH):
        while not seconds or (sum(seconds) < 5 and len(seconds) < 9):
            began = time.perf_counter()
            found = REPORTS[tool](module, batch, mode, plan)
            seconds.append(time.perf_counter() - began + found.get("unspent", 0.0))
            if peak is None:
                peak = memory("VmHWM") - before
        top, judge = abs(found["pairs"][0][0]), native_operator(module, batch)
        found["pairs"] = [
            (e, r / top if isinstance(r, float) else relative_residual(judge, e, r, top))
            for e, r in found["pairs"]
        ]
    return {**found, "seconds": float(np.median(seconds)), "mebibytes": peak}


def spawn(tool: str, network: str, data: Path, plan: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.pt"
        torch.save(plan, path)
        command = [sys.executable, __file__, "--only", tool, "--network", network]
        command += ["--data", str(data), "--plan", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def compare(network: str, data: Path, cap: float, quick: bool) -> None:
    """Print the table of one network."""
    mode = mode_of(network)
    module, batch = load(network, data, None)
    times, failures = time_products(copy.deepcopy(module), batch, mode, 2 if quick else 25)
    gradient = times["gradient"]
    with sdpa_kernel(SDPBackend.MATH):
        ours = measure_hessian(
            copy.deepcopy(module), [batch], loss=loss_of, mode=mode,
            num_steps=STEPS, num_probes=PROBES,
        )  # fmt: skip
        double = copy.deepcopy(module).double()
        truth = measure_hessian(
            double, [(batch[0].double(), batch[1])], loss=loss_of, mode=mode,
            num_steps=30 if quick else 80, num_probes=15 if quick else 40, seed=9,
        )  # fmt: skip
        op = lla_operator(copy.deepcopy(module), batch, mode)
        ends = float(truth.lambda_max), float(truth.lambda_min)
        plan = cheapest(op, ours.trace_sem, *ends, truth.criteria["frobenius_norm"])
        op.release()
    probes = plan["probes"]
    seconds_each = times.get("pyhessian", times["lla_callbacks"])
    plan["pyhessian_probes"] = probes if probes * seconds_each < cap else 40
    wide = {n.partition(" x")[2] or "1": t for n, t in times.items() if n.startswith("curv")}
    plan["chunk"] = int(min(wide, key=wide.get)) if wide else 1  # type: ignore[arg-type]
    print(
        f"\n### {network}\n\n{ours.num_params} parameters, {ours.num_samples} samples; a plain "
        f"gradient takes {1e3 * gradient:.3g} ms. Truth (float64, 80 steps, 40 probes): "
        f"lambda_max {float(truth.lambda_max):.6g}, lambda_min {float(truth.lambda_min):.4g}, "
        f"trace {truth.trace:.5g} ± {truth.trace_sem:.2g}. Wanted standard error of the trace: "
        f"{ours.trace_sem:.3g}; one plain probe deviates by {plan['plain_deviation']:.3g}. "
        f"Settings: {json.dumps(plan)}.\n"
    )
    print("| tool | gradients per product | seconds per report | ratio to ours | products "
          "| λ_max: error, residual | λ_min: error, residual | trace: error, standard error "
          "| peak MiB over a gradient | notes |")  # fmt: skip
    print("|---|" + "---:|" * 8 + "---|", flush=True)
    plan["state"] = module.state_dict()
    own = [spawn(TOOLS[0], network, data, plan)]
    peers: dict[str, tuple[dict[str, Any], float]] = {}
    for tool in TOOLS[1:]:
        if tool not in failures:  # each peer runs between two of our runs
            found = spawn(tool, network, data, plan)
            own.append(spawn(TOOLS[0], network, data, plan))
            peers[tool] = found, found["seconds"] / np.mean([r["seconds"] for r in own[-2:]])
    mean = {**own[0], "seconds": float(np.median([r["seconds"] for r in own]))}
    for tool, (found, ratio) in {TOOLS[0]: (mean, 1.0), **peers}.items():
        over = f">{cap:.0f}, about " if found["seconds"] > cap else ""
        note = {
            "lla_callbacks": f"{times['native'] / gradient:.2f} with native normalization; "
            "layer traces and criteria come along",
            "pyhessian": "λ_max and trace only: no λ_min, density() fails on current torch",
            "curvlinops": f"{plan['curvlinops_trace'][0]}, {plan['chunk']} columns at once: "
            f"{min(wide.values(), default=0) / gradient:.2f} gradients per column; no standard "
            "error, no layer traces",
            "hessian-eigenthings": f"{plan['eigenthings_trace'][0]}; no layer traces",
        }[tool]
        scale = abs(truth.lambda_max)
        ends = [
            f"{100 * abs(value - float(true)) / scale:.2g} %, {100 * residual:.2g} %"
            for (value, residual), true in zip(
                found["pairs"], (truth.lambda_max, truth.lambda_min), strict=False
            )
        ]
        partial = tool == "pyhessian" and plan["pyhessian_probes"] < probes
        miss = "not all run" if partial else f"{abs(found['trace'] - truth.trace):.2g}"
        sem = "none" if found["sem"] is None else f"{found['sem']:.2g}"
        print(
            f"| {tool} | {times[tool] / gradient:.2f} | {over}{found['seconds']:.3g} | {ratio:.1f} "
            f"| {found['products']} | {ends[0]} | {ends[1] if len(ends) > 1 else 'n/a'} "
            f"| {miss}, {sem} | {found['mebibytes']:.0f} | {note} |",
            flush=True,
        )
    for tool, why in failures.items():
        print(f"| {tool} |" + " n/a |" * 8 + f" {why} |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True, help="holds cifar10/, pretrained/")
    parser.add_argument("--network", choices=NETWORKS, help="only this one")
    parser.add_argument("--only", choices=TOOLS, help="one tool's report (used by the script)")
    parser.add_argument("--plan", type=Path, help="settings for --only (used by the script)")
    parser.add_argument("--cap", type=float, default=120.0, help="seconds for a peer's probes")
    parser.add_argument("--quick", action="store_true", help="rough timings, rough truth")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    warnings.filterwarnings("ignore")  # PyHessian's create_graph=True and its zero_grad
    if arguments.only:
        plan = torch.load(arguments.plan, weights_only=False)
        print(json.dumps(child(arguments.only, arguments.network, arguments.data, plan)))
        return
    began = time.perf_counter()
    for network in [arguments.network] if arguments.network else NETWORKS:
        compare(network, arguments.data, arguments.cap, arguments.quick)
    print(f"\n{(time.perf_counter() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    main()

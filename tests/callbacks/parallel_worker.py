"""Run by test_parallel.py: trains in two processes with a HessianMonitor, one case after the other.

python -m tests.callbacks.parallel_worker FOLDER CASE...
"""

import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import FSDPPrecision
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lla_callbacks import HessianMonitor, HessianTraceRegularizer, LossLandscapeMonitor
from lla_callbacks.linalg import vectors

SETTINGS = {"every_n_train_steps": 4, "num_samples": 16, "num_steps": 3, "num_probes": 2}
SLICES = {
    "every_n_train_steps": 1000,
    # By a clock of its own it would leave out points on a busy machine.
    "time_budget": None,
    "num_samples": 8,
    "planes": ["random", "trajectory"],
    "lines": ["top1", "gradient", "update"],
    "plane_points": 3,
    "line_points": 3,
    "num_rays": 1,
    "normalization": "filter",
    "vectors": "entry",
}
# What long vectors each process held, by the case: entries of the longest basis.
HELD: list[int] = []
_orthogonalise = vectors.Pieces.orthogonalise


def _noted(self, rows, vector, *scale):
    HELD.append(rows.shape[1])
    return _orthogonalise(self, rows, vector, *scale)


vectors.Pieces.orthogonalise = _noted


class Net(pl.LightningModule):
    """A smooth network in float64, with batch norm and dropout."""

    def __init__(self, unused=False):
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(
            nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 2)
        ).double()
        if unused:
            with torch.random.fork_rng():
                self.unused = nn.Linear(2, 2).double()

    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, sync_dist=True)
        return loss

    def train_dataloader(self):
        source = torch.Generator().manual_seed(7)
        x = torch.randn(36, 3, generator=source, dtype=torch.float64)
        data = TensorDataset(x, (x.sum(1) > 0).long())
        # In a known order: Lightning's own sampler shuffles.
        sampler = None
        if self.trainer.world_size > 1 and self.data_size() > 1:
            rank = self.trainer.global_rank
            sampler = DistributedSampler(data, self.data_size(), rank, shuffle=False)
        return DataLoader(data, batch_size=4, sampler=sampler)

    def data_size(self):
        return self.trainer.world_size

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.05)


class Sharded(Net):
    """Without batch norm, whose buffers would differ between processes; sharded by FSDP2."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(
            nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 2)
        ).double()

    how: ClassVar[dict] = {}

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        # The last layer is the outermost part's own, which stays gathered after a forward pass.
        for layer in self.net[:-1]:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh, **self.how)
        fully_shard(self.net, mesh=mesh, **self.how)


class Halves(Sharded):
    """Weights in float32, which training gathers, and whose gradients it sums, in bfloat16."""

    def __init__(self):
        super().__init__()
        self.net.float()

    @property
    def how(self):
        from torch.distributed.fsdp import MixedPrecisionPolicy

        return {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)}


class OnCPU(FSDPStrategy):
    """FSDP1 on a CPU, which torch can do and Lightning lets nobody ask for.

    In float64, which its precision plugin does not offer.
    """

    def _setup_model(self, model):
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)

    @property
    def precision_plugin(self):
        if self._precision_plugin is None:
            self._precision_plugin = FSDPPrecision("32-true")
            self._precision_plugin._desired_input_dtype = torch.float64
        return self._precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin):
        pass


class Flat(Sharded):
    """Cut up by FSDP1: the first layer alone, the others in the outermost part."""

    def configure_model(self):
        pass

    def val_dataloader(self):
        return self.train_dataloader()

    def validation_step(self, batch, batch_idx):
        # Leaves the outermost part gathered.
        self.net(batch[0])

    def on_train_end(self):
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(self.trainer.model, writeback=False):
            self.whole = {
                name.replace("_fsdp_wrapped_module.", ""): p.detach().clone()
                for name, p in self.named_parameters()
            }


def first_layer(module, recurse, nonwrapped_numel):
    """Say which module FSDP1 is to wrap."""
    return recurse or getattr(module, "in_features", None) == 3


class TensorParallel(Sharded):
    def configure_model(self):
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            RowwiseParallel,
            parallelize_module,
        )

        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)

    def data_size(self):
        return 1


class FailsOnSecond:
    """A loss that raises in the second process only, at a later firing, at the n-th call."""

    def __init__(self, call):
        self.calls, self.call = 0, call

    def __call__(self, module, batch):
        # At the fifth step, or from the very first measurement on.
        if module.trainer.global_step == 4 or self.call == 0:
            self.calls += 1
        if module.global_rank == 1 and self.calls == (self.call or 1):
            raise RuntimeError("the second process is unwell")
        return cross_entropy(module.net(batch[0]), batch[1])


class FailsOutside(HessianMonitor):
    """Fails in the first process while a measurement runs, but not in a product."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.spectrum.measure = self.measured

    def measured(self, objective, moment):
        if moment.step == 4:
            import contextlib

            @contextlib.contextmanager
            def broken(text, total):
                def advance(count):
                    raise ValueError("the bar is broken")

                yield advance if objective.module.global_rank == 0 else (lambda count: None)

            moment = replace(moment, tools=replace(moment.tools, progress=broken))
        return type(self.spectrum).measure(self.spectrum, objective, moment)


class NanWhileMoved:
    """A loss that is NaN, in all processes, while a measurement has moved the weights."""

    calls = 0

    def __call__(self, module, batch):
        loss = cross_entropy(module.net(batch[0]), batch[1])
        if module.trainer.global_step == 4:
            self.calls += 1
        return loss * float("nan") if self.calls > 16 else loss


class Killed:
    """A loss in which the second process dies."""

    def __call__(self, module, batch):
        if module.trainer.global_step == 4 and module.global_rank == 1:
            os._exit(3)
        return cross_entropy(module.net(batch[0]), batch[1])


def strategy_of(case):
    ddp = {"process_group_backend": "gloo"}
    if case.startswith("flat"):
        return OnCPU(auto_wrap_policy=first_layer, **ddp)
    if case.startswith("fsdp"):
        size = {"data_parallel_size": 2, "tensor_parallel_size": 1}
        return ModelParallelStrategy(**size, save_distributed_checkpoint=False, **ddp)
    if case.startswith("tensor"):
        size = {"data_parallel_size": 1, "tensor_parallel_size": 2}
        return ModelParallelStrategy(**size, save_distributed_checkpoint=False, **ddp)
    options = {
        "unused": {"find_unused_parameters": True},
        "static": {"static_graph": True},
        "views": {"gradient_as_bucket_view": True},
    }
    return DDPStrategy(**ddp, **options.get(case, {}))


def module_of(case):
    kinds = {"fsdp": Sharded, "flat": Flat, "tensor": TensorParallel}
    kind = kinds.get(case.partition("_")[0], Net)
    if case.startswith("fsdp_policy"):
        return Halves()
    return Net(unused=True) if case == "unused" else kind()


def watcher_of(case):
    if case.endswith("without"):
        return None
    if "noise" in case:
        # Strong enough for a wrong sign to be seen.
        return HessianTraceRegularizer(0.02, estimator="noise", relative="relative" in case)
    if case == "fsdp_policy_slices":
        return LossLandscapeMonitor(
            **SLICES | {"planes": ["random"], "lines": ["gradient"], "num_rays": 0}
        )
    if case.endswith("slices"):
        return LossLandscapeMonitor(**SLICES, convexity_points=3 if case[0] == "t" else 0)
    settings = dict(SETTINGS)
    if case == "fsdp_policy":
        # Each gradient is gathered and summed layer by layer: first and last measurement alone.
        settings["every_n_train_steps"] = 1000
    if case == "fsdp":
        # Batches of unequal sizes, and one process has none in the last round.
        settings |= {"num_samples": 36, "num_layer_steps": 2, "num_layer_probes": 2}
        settings["every_n_train_steps"] = 10
    if case.startswith("fails_at") and case != "fails_in_product":
        settings["loss"] = FailsOnSecond(int(case.removeprefix("fails_at")))
    if case == "fails_outside":
        return FailsOutside(**settings)
    if case == "fails_in_product":
        # Every product calls the loss.
        settings |= {"loss": FailsOnSecond(16), "engine": "difference"}
    if case == "fsdp_fails":
        settings["loss"] = NanWhileMoved()
    if case == "killed":
        settings["loss"] = Killed()
    if case == "difference":
        settings["engine"] = "difference"
    if case == "fsdp_exact":
        settings["engine"] = "exact"
    if case == "tensor":
        settings["every_n_train_steps"] = 9
    if case == "layers":
        settings |= {"num_layer_steps": 2, "num_layer_probes": 2}
    if case == "tracking":
        settings |= {"track_every_n_train_steps": 1}
    if case == "budget":
        settings |= {"every_n_train_steps": 1, "max_overhead": 0.5}
    return HessianMonitor(**settings)


def train(folder, case):
    # Vectors of so small a network stay whole unless told otherwise; in "static" they do.
    vectors.LEAST_CUT = 2**18 if case == "static" else 0
    HELD.clear()
    pl.seed_everything(3, verbose=False)
    watcher = watcher_of(case)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=strategy_of(case),
            max_epochs=2,
            logger=False,
            callbacks=[watcher] if watcher else [],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            use_distributed_sampler=False,
        )
        module = module_of(case)
        try:
            trainer.fit(module)
        except MisconfigurationException as error:
            torch.save({"refused": str(error)}, folder / f"{case}_{trainer.global_rank}.pt")
            return
    found = {
        "weights": getattr(module, "whole", None)
        or {n: _whole(p) for n, p in module.state_dict().items()},
        "random": torch.get_rng_state(),
        "logged": {t: float(v) for t, v in trainer.callback_metrics.items() if "regularizer" in t},
        "warnings": [str(w.message) for w in seen if "leaves a gap" in str(w.message)],
        "reports": {},
        "held": max(HELD, default=0),
        "all warnings": [str(w.message) for w in seen if "Monitor" in str(w.message)],
    }
    if case.endswith("slices"):
        found["slices"] = {
            f"{step}/{name}": part
            for step, report in watcher.history
            for name, part in read(report).items()
        }
        torch.save(found, folder / f"{case}_{trainer.global_rank}.pt")
        return
    if case == "tracking":
        found["tracked"] = {
            step: (float(t.lambda_max), t.trace, t.trace_sem, t.loss) for step, t in watcher.tracked
        }
    for step, r in getattr(watcher, "history", []):
        found["reports"][step] = {
            "lambda_max": float(r.lambda_max),
            "lambda_max_residual": r.lambda_max.residual,
            "lambda_min": float(r.lambda_min),
            "trace": r.trace,
            "trace_sem": r.trace_sem,
            "loss": r.loss,
            "gradient_norm": r.gradient_norm,
            "num_samples": r.num_samples,
            "kh05": r.criteria["kh05"],
            "stability": r.criteria["stability"],
            "engine": r.engine,
            "precision": r.precision,
            "reason": r.engine_reason,
            "layers": {name: m.trace for name, m in r.layers.items()},
            "gaps": dict(r.gaps),
        }
    torch.save(found, folder / f"{case}_{trainer.global_rank}.pt")


def read(report):
    """Return the numbers of all slices of a report."""
    found = {"loss": torch.tensor(report.loss, dtype=torch.float64)}
    for name, part in report.slices.items():
        if name == "convexity":
            found[name] = torch.stack([part.lambda_min, part.lambda_max])
        else:
            found[name] = part.radii if name == "basin" else part.loss
            for k, direction in enumerate(getattr(part, "directions", ())):
                found[f"{name}/reach{k}"] = torch.tensor(direction.reach, dtype=torch.float64)
    return found


def main():
    folder, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    for case in cases:
        train(Path(folder), case)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


if __name__ == "__main__":
    main()

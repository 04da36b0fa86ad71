"""What do the README's two monitors cost on five ordinary projects, and what do they show?

Run: ``python docs/benchmarks/ordinary.py [PROJECT ...] [--data FOLDER] [--pairs N] [--short]``.
Each fit runs in a fresh process, with and without the monitors in turn; processor seconds of
``trainer.fit`` are compared. Nothing in a project knows of the monitors. ``--data`` is a folder
with ``fashion-mnist/``; without it the classifier trains on scikit-learn's digits. The last
project needs ``pip install .[benchmarks]`` (peft).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import pytorch_lightning as pl  # noqa: E402

# Epochs of a long and of a short run: about 20 to 60 seconds, and about 5.
EPOCHS = {
    "classifier": (5, 1),
    "gpt": (3, 1),
    "regression": (220, 50),
    "gan": (360, 80),
    "lora": (6, 2),
}


# -- an image classifier with batch norm ------------------------------------------------------


class Classifier(pl.LightningModule):
    """A small convolutional network with batch norm, as in many a tutorial."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * (side // 4) ** 2, 128), nn.ReLU(), nn.Dropout(0.25),
            nn.Linear(128, 10),
        )  # fmt: skip

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_acc", (self.net(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-3)


def classifier(data: Path | None) -> dict[str, Any]:
    from image_data import load_images

    folder = None if data is None else data / "fashion-mnist"
    train, test = load_images(folder)
    x = train.tensors[0]
    return {
        "module": Classifier(x.shape[1], x.shape[-1]),
        "train": DataLoader(train, batch_size=128, shuffle=True),
        "val": DataLoader(test, batch_size=256),
    }


# -- a small GPT ------------------------------------------------------------------------------


class Block(nn.Module):
    """Causal attention and a GELU network, each behind layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (
            part.view(b, t, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.ln1(x)).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(self.ln2(x))


class GPT(pl.LightningModule):
    """A character model of four layers."""

    def __init__(self, vocabulary: int, context: int = 64, width: int = 128) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(4)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        h = self.tokens(x) + self.places(torch.arange(x.shape[1], device=x.device))
        logits = self.head(self.norm(self.blocks(h)))
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 1e-3, weight_decay=0.1)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
        }


class Windows(Dataset):
    """Stretches of a text and the same a character later."""

    def __init__(self, codes: Tensor, context: int, stride: int) -> None:
        self.codes, self.context, self.stride = codes, context, stride

    def __len__(self) -> int:
        return (len(self.codes) - self.context - 1) // self.stride

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        start = i * self.stride
        piece = self.codes[start : start + self.context + 1]
        return piece[:-1], piece[1:]


def text_files() -> list[Path]:
    return sorted((ROOT / "docs").glob("*.md"))


def gpt(data: Path | None) -> dict[str, Any]:
    text = "\n".join(path.read_text() for path in text_files())[:60_000]
    letters = sorted(set(text))
    codes = torch.tensor([letters.index(c) for c in text])
    return {
        "module": GPT(len(letters)),
        "train": DataLoader(Windows(codes, 64, 16), batch_size=32, shuffle=True),
        "trainer": {"precision": "bf16-mixed", "gradient_clip_val": 1.0},
    }


# -- regression on dicts ----------------------------------------------------------------------


class Regression(pl.LightningModule):
    """A network of dict batches with a Huber loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(16, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 1)
        )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = F.huber_loss(self.net(batch["features"]).squeeze(-1), batch["target"])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


class Rows(Dataset):
    """A table, a dict a row."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"features": self.x[i], "target": self.y[i]}


def regression(data: Path | None) -> dict[str, Any]:
    x = torch.randn(4096, 16)
    y = torch.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2] + 0.1 * torch.randn(4096)
    return {
        "module": Regression(),
        "train": DataLoader(Rows(x, y), batch_size=64, shuffle=True),
    }


# -- a GAN ------------------------------------------------------------------------------------


class GAN(pl.LightningModule):
    """Two networks, two optimizers, optimized by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(16, 128), nn.LeakyReLU(0.2), nn.Linear(128, 64), nn.Sigmoid()
        )
        self.critic = nn.Sequential(nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))

    def critic_loss(self, x: Tensor, fake: Tensor) -> Tensor:
        real, made = self.critic(x), self.critic(fake)
        return (F.softplus(-real) + F.softplus(made)).mean()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x,) = batch
        first, second = self.optimizers()
        fake = self.generator(torch.randn(len(x), 16, device=x.device))
        loss = self.critic_loss(x, fake.detach())
        second.zero_grad()
        self.manual_backward(loss)
        second.step()
        loss_g = F.softplus(-self.critic(fake)).mean()
        first.zero_grad()
        self.manual_backward(loss_g)
        first.step()
        self.log_dict({"critic": loss, "generator": loss_g})

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(self.generator.parameters(), 2e-4, betas=(0.5, 0.9)),
            torch.optim.Adam(self.critic.parameters(), 2e-4, betas=(0.5, 0.9)),
        ]


def critic_loss(module: GAN, batch: Any) -> Tensor:
    """What the monitors measure: the critic's loss against the present generator."""
    (x,) = batch
    return module.critic_loss(x, module.generator(torch.randn(len(x), 16, device=x.device)))


def gan(data: Path | None) -> dict[str, Any]:
    from image_data import load_images

    x = load_images(None)[0].tensors[0].flatten(1)
    return {
        "module": GAN(),
        "train": DataLoader(TensorDataset(x), batch_size=64, shuffle=True),
        "loss": critic_loss,
    }


# -- a Hugging Face classifier with LoRA ------------------------------------------------------


class Tuned(pl.LightningModule):
    """A BERT whose attention is tuned through LoRA, the rest frozen."""

    def __init__(self, vocabulary: int, labels: int) -> None:
        super().__init__()
        from peft import LoraConfig, get_peft_model
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=vocabulary, hidden_size=192, num_hidden_layers=6, num_attention_heads=6,
            intermediate_size=768, max_position_embeddings=64, num_labels=labels,
        )  # fmt: skip
        lora = LoraConfig(
            task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"]
        )
        self.model = get_peft_model(BertForSequenceClassification(config), lora)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-3)


class Lines(Dataset):
    """Stretches of several texts, which are to be told apart."""

    def __init__(self, texts: list[str], length: int) -> None:
        letters = sorted(set("".join(texts)))
        self.vocabulary = len(letters) + 1
        code = {c: i + 1 for i, c in enumerate(letters)}
        self.rows = [
            (torch.tensor([code[c] for c in text[i : i + length]]), label)
            for label, text in enumerate(texts)
            for i in range(0, len(text) - length, length)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        codes, label = self.rows[i]
        return {
            "input_ids": codes,
            "attention_mask": torch.ones_like(codes),
            "labels": torch.tensor(label),
        }


def lora(data: Path | None) -> dict[str, Any]:
    texts = [path.read_text()[:8_000] for path in text_files()[:6]]
    rows = Lines(texts, 48)
    return {
        "module": Tuned(rows.vocabulary, len(texts)),
        "train": DataLoader(rows, batch_size=32, shuffle=True),
    }


PROJECTS = {
    "classifier": classifier,
    "gpt": gpt,
    "regression": regression,
    "gan": gan,
    "lora": lora,
}


# -- one fit, and all of them -----------------------------------------------------------------


def callbacks_of(what: str, loss: Any) -> list[Any]:
    """Return the callbacks of a bundle or of the README's first snippet."""
    import lla_callbacks

    if what == "none":
        return []
    if what == "readme":
        return [
            lla_callbacks.HessianMonitor(loss=loss), lla_callbacks.LossLandscapeMonitor(loss=loss)
        ]  # fmt: skip
    return getattr(lla_callbacks, what)(loss=loss)


@contextmanager
def booked() -> Iterator[list[float]]:
    """Measure processor seconds inside the monitors' hooks: what they do, without the noise."""
    from lla_callbacks.callbacks.account import Account

    spent, began = [0.0], [0.0]
    begin, end = Account.open, Account.close

    def opened(self: Any, *arguments: Any, **settings: Any) -> Any:
        began[0] = time.process_time()
        return begin(self, *arguments, **settings)

    def closed(self: Any) -> Any:
        spent[0] += time.process_time() - began[0]
        return end(self)

    Account.open, Account.close = opened, closed  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        Account.open, Account.close = begin, end  # type: ignore[method-assign]


def fit(project: str, what: str, epochs: int, data: Path | None) -> dict[str, Any]:
    """Return what one fit took and showed."""
    pl.seed_everything(0, verbose=False)
    made = PROJECTS[project](data)
    watchers = callbacks_of(what, made.get("loss"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            callbacks=watchers,
            enable_model_summary=False,
            logger=pl.loggers.TensorBoardLogger(folder),
            enable_progress_bar=False,
            **made.get("trainer", {}),
        )
        began, clock = time.process_time(), time.perf_counter()
        with booked() as spent:
            trainer.fit(made["module"], made["train"], made.get("val"))
        found = {
            "cpu": time.process_time() - began,
            "booked": spent[0],
            "wall": time.perf_counter() - clock,
            "steps": trainer.global_step,
            "weights": float(sum(p.double().sum() for p in made["module"].parameters())),
        }
        if watchers:
            found |= shown(Path(trainer.logger.log_dir), watchers)
    return found


def shown(folder: Path, watchers: list[Any]) -> dict[str, Any]:
    """Return what TensorBoard has of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), {"images": 0, "scalars": 0}).Reload()
    tags = events.Tags()
    points = {
        tag: len(events.Scalars(f"hessian/{tag}"))
        for tag in ("lambda_max", "trace", "trace_sem")
        if f"hessian/{tag}" in tags["scalars"]
    }
    report = watchers[0].report
    plane = watchers[1].report
    size = None if report is None else (report.num_samples, report.num_steps, report.num_probes)
    return {
        "points": points,
        "images": sorted(tags["images"]),
        "size": size,
        "plane": None
        if plane is None or not plane.planes
        else (list(plane.planes["random"].loss.shape), plane.planes["random"].facts.num_samples),
        "overhead": events.Scalars("hessian/overhead")[-1].value
        if "hessian/overhead" in tags["scalars"]
        else None,
    }


def in_a_process(*arguments: str) -> dict[str, Any]:
    """Return what this script prints of one fit in a fresh process."""
    run = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if run.returncode:
        raise SystemExit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("projects", nargs="*", default=list(PROJECTS))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--short", action="store_true", help="runs of about five seconds")
    parser.add_argument("--what", default="readme", help="readme, economy, standard or paper")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--one", choices=("none", "readme", "economy", "standard", "paper"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.one:
        if not arguments.verbose:
            logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
        found = fit(arguments.projects[0], arguments.one, arguments.epochs, arguments.data)
        print(json.dumps(found))
        return
    print(
        "| project | steps | without, s | with, s | ratio | in hooks | points | spectrum | plane |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for project in arguments.projects:
        epochs = arguments.epochs or EPOCHS[project][arguments.short]
        common = [project, "--epochs", str(epochs)]
        if arguments.data:
            common += ["--data", str(arguments.data.resolve())]
        plain, watched = [], []
        for _ in range(arguments.pairs):
            plain.append(in_a_process(*common, "--one", "none"))
            watched.append(in_a_process(*common, "--one", arguments.what))
            assert plain[-1]["weights"] == watched[-1]["weights"], "training was changed"
        hooks = statistics.median(w["booked"] / (w["cpu"] - w["booked"]) for w in watched)
        ratio = statistics.median(w["cpu"] / p["cpu"] for p, w in zip(plain, watched, strict=True))
        last = watched[-1]
        print(
            f"| {project} | {last['steps']} | {statistics.median(p['cpu'] for p in plain):.1f} "
            f"| {statistics.median(w['cpu'] for w in watched):.1f} | {ratio:.3f} | {hooks:.1%} "
            f"| {last['points'].get('lambda_max', 0)}, {last['points'].get('trace', 0)} "
            f"| {last['size']} | {last['plane']} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

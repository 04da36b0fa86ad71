"""What is asked of the command line, from arguments and a YAML file."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from lla_callbacks.command.errors import CommandError, nearest
from lla_callbacks.objective.checks import one_of, seed_of, whole
from lla_callbacks.objective.objective import Mode
from lla_callbacks.objective.precision import Precision

# Those of a LightningDataModule: each has a loader.
SPLITS = {"train": "fit", "val": "validate", "test": "test", "predict": "predict"}

EXAMPLES = """\
examples:
  python -m lla_callbacks project.models.Net --checkpoint last.ckpt --data project.data.Digits
  python -m lla_callbacks train.py:Net --checkpoint last.ckpt --data train.py:batches \\
      --planes random hessian --samples 1024 --out curvature
  python -m lla_callbacks --config measure.yaml --seed 1      # arguments win over the file

measure.yaml, in which every option may stand under its name:
  module: {class_path: project.models.Net, init_args: {width: 64}}
  checkpoint: last.ckpt
  data: {class_path: project.data.Digits, init_args: {folder: data}}
  hessian: {num_steps: 60, layers: blocks}       # whatever measure_hessian takes
  slices: {plane_points: 33, num_rays: 50}       # whatever LossLandscapeMonitor draws

A class or function is named by its import path, project.models.Net, or by its file,
train.py:Net. The present folder is searched first.

the page of a run:
  python -m lla_callbacks report LOGDIR          # report --help says more

exit code: 0 done, 1 the measurement failed, 2 what was asked cannot be, 130 interrupted.
"""


@dataclass(frozen=True)
class Target:
    """A class or a function, and what it is called with."""

    path: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What is asked: which module and data, what is measured of them, where it goes."""

    module: Target
    checkpoint: Path | None = None
    data: Target | None = None
    split: str = "train"
    loss: str | None = None
    prefix: str = ""
    trust: bool = False
    samples: int = 256
    mode: Mode = "batch"
    precision: Precision = "float32"
    device: str = "auto"
    seed: int = 0
    planes: tuple[str, ...] = ("random",)
    lines: tuple[str, ...] = ("random", "top1")
    hessian: Mapping[str, Any] | None = field(default_factory=dict)
    slices: Mapping[str, Any] = field(default_factory=dict)
    out: Path | None = None
    quiet: bool = False

    def plain(self) -> dict[str, Any]:
        """Return it as a YAML file holds it."""
        found: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if name in ("module", "data") and value is not None:
                value = {"class_path": value["path"], "init_args": dict(value["arguments"])}
            elif isinstance(value, Path):
                value = str(value)
            elif isinstance(value, tuple):
                value = list(value)
            elif name == "hessian" and value is None:
                value = False
            found[name] = value
        return found


def read_request(arguments: Sequence[str]) -> Request:
    """Return what arguments, and the file that they name, ask for.

    Raises:
        CommandError: If that cannot be.
        SystemExit: If argparse refuses an argument, or was asked for help.
    """
    given = vars(parser().parse_args(list(arguments)))
    config = given.pop("config", None)
    found = {} if config is None else _read_file(Path(config))
    for what in ("module", "data"):
        # From a file the class may come with arguments of its own, which go on to hold.
        extra = dict(map(_pair, given.pop(f"{what}_args", ())))
        if what in given:
            found[what] = {"class_path": given.pop(what), "init_args": extra}
        elif extra and what not in found:
            raise CommandError(f"--{what}-arg is given and --{what} is not: say of what.")
        elif extra:
            target = _target(what, found[what])
            found[what] = {"class_path": target.path, "init_args": {**target.arguments, **extra}}
    if given.pop("no_hessian", False):
        given["hessian"] = False
    found |= given
    if "module" not in found:
        raise CommandError(
            "no module: name the class that made the checkpoint, for instance "
            "python -m lla_callbacks project.models.Net --checkpoint last.ckpt --data ... "
            "(--help says more)."
        )
    return _checked(found)


def parser() -> argparse.ArgumentParser:
    """Return the parser of a measurement; what is not given is absent."""
    made = argparse.ArgumentParser(
        prog="python -m lla_callbacks",
        description="Measure the curvature of the loss at a checkpoint: the Hessian's extreme "
        "eigenvalues, trace and spectrum, and the loss on lines and planes through the weights. "
        "Writes numbers (.npz), figures (.png), a summary and a page (report.html).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add = made.add_argument
    add(
        "module", nargs="?", metavar="MODULE",
        help="class of the module (a LightningModule is rebuilt from its checkpoint), or a "
        "function that returns one",
    )  # fmt: skip
    add("--config", metavar="FILE", help="a YAML file with any of these options")
    what = made.add_argument_group("what is measured")
    add = what.add_argument
    add("--checkpoint", metavar="FILE", help="Lightning's, or a state dict saved by torch.save")
    add(
        "--data", metavar="DATA",
        help="a LightningDataModule, or a function that returns batches (a DataLoader, a list); "
        "without it the module's own train_dataloader",
    )  # fmt: skip
    add("--split", metavar="NAME", help=f"loader of a data module: {', '.join(SPLITS)} (train)")
    add("--loss", metavar="PATH", help="loss(module, batch); else the training_step is replayed")
    for name in ("module", "data"):
        add(
            f"--{name}-arg", dest=f"{name}_args", metavar="KEY=VALUE", action="append",
            help=f"an argument of {name.upper()}, again for each",
        )  # fmt: skip
    add("--prefix", metavar="TEXT", help="take the checkpoint's keys under this, without it")
    add(
        "--trust", action="store_true",
        help="read a checkpoint that holds more than tensors and plain values; it can run any "
        "code, so only if you know who wrote it",
    )  # fmt: skip
    how = made.add_argument_group("how")
    add = how.add_argument
    add("--samples", metavar="N", help="take batches until they have so many samples (256)")
    add("--mode", metavar="NAME", help=f"normalization: {', '.join(get_args(Mode))} (batch)")
    add("--precision", metavar="NAME", help=f"{', '.join(get_args(Precision))} (float32)")
    add("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1, ... (auto)")
    add("--seed", metavar="N", help="of every random vector, and of a shuffled loader (0)")
    add(
        "--planes", nargs="*", metavar="NAME",
        help="random, hessian, hessian_ends, or two names joined by +; nothing for none (random)",
    )  # fmt: skip
    add("--lines", nargs="*", metavar="NAME", help="random, top1, bottom1, ... (random top1)")
    add("--no-hessian", action="store_true", help="draw slices only")
    add = made.add_argument_group("where to").add_argument
    add("--out", metavar="FOLDER", help="where results go (lla_<name of the checkpoint>)")
    add("--quiet", action="store_true", help="no bar and no summary")
    return made


def _read_file(path: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"--config {path}: {error.strerror or error}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CommandError(f"--config {path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, Mapping):
        raise CommandError(f"--config {path} holds no names with values, such as 'module: ...'.")
    known = [f.name for f in fields(Request)]
    for name in found:
        if name not in known:
            raise CommandError(
                f"--config {path}: {name!r} is no option.{nearest(str(name), known)} "
                f"They are {', '.join(known)}."
            )
    return dict(found)


def _pair(text: str) -> tuple[str, Any]:
    """Return KEY=VALUE as a name and a value, read as YAML reads it."""
    import yaml

    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier():
        raise CommandError(f"{text!r} is no KEY=VALUE, such as width=64.")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        return name, value


def _target(name: str, value: Any) -> Target:
    if isinstance(value, str) and value.strip():
        return Target(value.strip())
    if isinstance(value, Mapping) and isinstance(value.get("class_path"), str):
        arguments = value.get("init_args") or {}
        if set(value) <= {"class_path", "init_args"} and isinstance(arguments, Mapping):
            return Target(value["class_path"], dict(arguments))
    raise CommandError(
        f"{name} is {value!r}; give an import path, or class_path: with init_args: below it."
    )


def _checked(found: dict[str, Any]) -> Request:
    """Return a request whose values are of their types."""
    for name in ("module", "data"):
        if found.get(name) is not None:
            found[name] = _target(name, found[name])
    for name in ("checkpoint", "out"):
        if found.get(name) is not None:
            found[name] = Path(str(found[name])).expanduser()
    for name in ("planes", "lines"):
        if name in found:
            names = found[name] or []
            found[name] = (names,) if isinstance(names, str) else tuple(map(str, names))
    if found.get("hessian") in (None, False) and "hessian" in found:
        found["hessian"] = None
    for name in ("hessian", "slices"):
        if name in found and found[name] is not None and not isinstance(found[name], Mapping):
            raise CommandError(f"{name} is {found[name]!r}; give names with values below it.")
    try:
        for name, least in (("samples", 1), ("seed", 0)):
            if name in found:
                number = int(found[name]) if _is_digits(found[name]) else found[name]
                found[name] = whole(name, number, least) if least else seed_of(name, number)
        for name, kind in (("mode", Mode), ("precision", Precision)):
            if name in found:
                one_of(name, found[name], kind)
    except ValueError as error:
        raise CommandError(str(error)) from error
    split = found.get("split", "train")
    if split not in SPLITS:
        raise CommandError(f"split is {split!r}; give one of {', '.join(SPLITS)}.")
    made = Request(**found)
    if made.hessian is None and not (made.planes or made.lines or made.slices.get("num_rays")):
        raise CommandError("there is nothing to measure: no Hessian, no planes and no lines.")
    return made


def _is_digits(value: Any) -> bool:
    return isinstance(value, str) and value.isdecimal()

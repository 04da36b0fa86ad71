"""From names to a module with its weights, and to batches."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lla_callbacks.command.errors import CommandError, nearest
from lla_callbacks.command.request import SPLITS, Request, Target
from lla_callbacks.linalg.errors import described


def named(what: str, path: str) -> Any:
    """Return what an import path, or ``file.py:Name``, names.

    Raises:
        CommandError: If there is no such module, file or name in it.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        # As python -m has it already, which a console script does not.
        sys.path.insert(0, here)
    place, _, name = path.rpartition(":" if ":" in path else ".")
    if not place or not name:
        raise CommandError(f"{what} is {path!r}; give an import path such as project.models.Net.")
    module = _of_file(what, Path(place)) if place.endswith(".py") else _imported(what, place)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            known = [n for n in dir(found) if not n.startswith("_")]
            raise CommandError(f"{what}: {place} has no {name}.{nearest(part, known)}")
        found = getattr(found, part)
    return found


def _imported(what: str, place: str) -> Any:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and (place == error.name or place.startswith(f"{error.name}.")):
            raise CommandError(
                f"{what}: there is no module {error.name!r} here (searched the present folder "
                "first). Go to the folder that holds it, or give its file: path/to/file.py:Name."
            ) from error
        raise CommandError(
            f"{what}: {place} needs {error.name!r}, which is not installed."
        ) from error
    except Exception as error:
        raise CommandError(f"{what}: importing {place} ended in {described(error)}") from error


def _of_file(what: str, path: Path) -> Any:
    if not path.is_file():
        raise CommandError(f"{what}: there is no file {path}.")
    resolved = path.resolve()
    name = f"_lla_callbacks_file_{path.stem}"
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", "") == str(resolved):
        # One module for the module and the data of a file.
        return known
    spec = importlib.util.spec_from_file_location(name, resolved)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    # What it imports may lie beside it.
    sys.path.insert(0, str(resolved.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise CommandError(f"{what}: running {path} ended in {described(error)}") from error
    finally:
        sys.path.remove(str(resolved.parent))
    return module


def module_from(request: Request) -> tuple[nn.Module, int]:
    """Return the module with the checkpoint's weights, and the step that it was written at.

    Raises:
        CommandError: If the class, the checkpoint or one of its keys is missing.
    """
    made = named("module", request.module.path)
    stored = None if request.checkpoint is None else _stored(request.checkpoint, request.trust)
    if stored is None and isinstance(made, type):
        raise CommandError(
            f"no checkpoint for {request.module.path}: its first weights would be measured. Give "
            "--checkpoint, or name a function that returns the module with its weights."
        )
    state = None if stored is None else _weights(request, stored)
    module = _built(request, made, stored)
    if not isinstance(module, nn.Module):
        raise CommandError(
            f"module: {request.module.path} returned {type(module).__name__}, not a module."
        )
    if state is not None:
        _load(request, module, state)
    step = (stored or {}).get("global_step", 0)
    return module.to(_device(request.device)), step if isinstance(step, int) else 0


def _stored(path: Path, trust: bool) -> dict[str, Any]:
    if path.is_dir():
        raise CommandError(
            f"checkpoint: {path} is a folder, as sharded strategies write it. Make one file of it: "
            f"python -m lightning.pytorch.utilities.consolidate_checkpoint {path}"
        )
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        raise CommandError(f"checkpoint: there is no file {path}.{nearest(path.name, beside)}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=not trust)
    except Exception as error:
        # In torch's words; what is no checkpoint at all ends in others.
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise CommandError(
                f"checkpoint: {path} holds more than tensors and plain values (classes among its "
                "hyperparameters, say), which could run any code. If you know who wrote it, give "
                "--trust."
            ) from error
        raise CommandError(
            f"checkpoint: {path} cannot be read: {described(error).splitlines()[0]}"
        ) from error
    if isinstance(found, nn.Module):
        found = found.state_dict()
    if not isinstance(found, Mapping):
        raise CommandError(f"checkpoint: {path} holds {type(found).__name__}, no state dict.")
    if not isinstance(found.get("state_dict"), Mapping):
        return {"state_dict": dict(found)}
    return dict(found)


def _weights(request: Request, stored: Mapping[str, Any]) -> dict[str, Any]:
    state = dict(stored["state_dict"])
    if not request.prefix:
        return state
    cut = {k.removeprefix(request.prefix): v for k, v in state.items()
           if k.startswith(request.prefix)}  # fmt: skip
    if not cut:
        some = ", ".join(list(state)[:3])
        raise CommandError(
            f"prefix: no key of {request.checkpoint} begins with {request.prefix!r}; they are "
            f"{some}, ..."
        )
    return cut


def _built(request: Request, made: Any, stored: Mapping[str, Any] | None) -> Any:
    """Return the module, its constructor's arguments those of the checkpoint and the user's."""
    arguments = dict(request.module.arguments)
    if isinstance(made, nn.Module):
        return made
    if not callable(made):
        raise CommandError(
            f"module: {request.module.path} is {type(made).__name__}; name a class or a function."
        )
    if stored is not None and "pytorch-lightning_version" in stored:
        load = getattr(made, "load_from_checkpoint", None)
        if callable(load):
            try:
                # Lightning drops what the class does not take, without a word.
                inspect.signature(made).bind_partial(**arguments)
            except TypeError as error:
                raise CommandError(
                    f"module: {request.module.path}{inspect.signature(made)} cannot be called: "
                    f"{error}. Give other arguments (--module-arg)."
                ) from error
            return _restored(request, load, arguments)
    return _called("module", request.module, made, arguments)


def _restored(request: Request, load: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Return a LightningModule made with the hyperparameters that its checkpoint keeps."""
    # Older ones read whatever a file holds; this one was read without running code before.
    if "weights_only" in inspect.signature(load).parameters:
        arguments["weights_only"] = not request.trust
    try:
        # Which keys fit is said below, in the same words for every module.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found keys that are")
            return load(request.checkpoint, map_location="cpu", strict=False, **arguments)
    except Exception as error:
        hint = ""
        if isinstance(error, TypeError) and "argument" in str(error):
            hint = " Give its arguments: --module-arg KEY=VALUE, or init_args: in a YAML file."
        raise CommandError(
            f"module: rebuilding {request.module.path} from {request.checkpoint} ended in "
            f"{described(error)}{hint}"
        ) from error


def _called(what: str, target: Target, made: Callable[..., Any], arguments: Any) -> Any:
    try:
        inspect.signature(made).bind(**arguments)
    except TypeError as error:
        option = f"--{what}-arg KEY=VALUE"
        raise CommandError(
            f"{what}: {target.path}{inspect.signature(made)} cannot be called: {error}. Give its "
            f"arguments: {option}, or init_args: in a YAML file."
        ) from error
    except ValueError:
        # Written in C, say: found out by calling it.
        pass
    try:
        return made(**arguments)
    except CommandError:
        raise
    except Exception as error:
        raise CommandError(f"{what}: {target.path}(...) ended in {described(error)}") from error


def _load(request: Request, module: nn.Module, state: dict[str, Any]) -> None:
    configure = getattr(module, "configure_model", None)
    own = module.state_dict()
    if not own and callable(configure):
        # Layers that are made on the device: Lightning calls this, and may do so again.
        configure()
        own = module.state_dict()
    # Some keep only a part of their weights in checkpoints, and say so.
    whole = getattr(module, "strict_loading", True)
    missing = [k for k in own if k not in state] if whole else []
    unknown = [k for k in state if k not in own] if whole else []
    others = [
        f"{k} is {tuple(v.shape)} there and {tuple(own[k].shape)} here"
        for k, v in state.items()
        if isinstance(v, Tensor) and k in own and isinstance(own[k], Tensor)
        and v.shape != own[k].shape
    ]  # fmt: skip
    if missing or unknown or others:
        parts = [
            f"{len(found)} {words} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})"
            for found, words in (
                (missing, "missing in it"),
                (unknown, "unknown to the module"),
                (others, "of another shape"),
            )
            if found
        ]
        raise CommandError(
            f"checkpoint: {request.checkpoint} is not one of {request.module.path}: keys "
            f"{'; '.join(parts)}.{_prefix_of(missing, state)}"
        )
    module.load_state_dict(state, strict=whole)


def _prefix_of(missing: list[str], state: Mapping[str, Any]) -> str:
    """Return what to do where all that is missing is there under a common prefix."""
    if missing:
        for key in state:
            prefix = key.removesuffix(missing[0])
            if key.endswith(missing[0]) and prefix and all(prefix + k in state for k in missing):
                return f" They are there under {prefix!r}: give --prefix {prefix}"
    return " Give the class that it was written with, and its arguments (--module-arg)."


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        said = str(error).splitlines()[0]
        raise CommandError(f"device is {name!r}, which cannot be had: {said}") from error
    return found


def batches_from(request: Request, module: nn.Module) -> Iterable[Any]:
    """Return batches as training would see them, also through the transfer hooks.

    Raises:
        CommandError: If there are none.
    """
    if request.data is None:
        loader = getattr(module, "train_dataloader", None)
        try:
            found = loader() if callable(loader) else None
        except Exception as error:  # noqa: BLE001 - Lightning's own says that there is none
            found = None if "train_dataloader" in str(error) else _refuse("data", "data", error)
        if found is None:
            raise CommandError(
                "no data: give --data, a LightningDataModule or a function that returns batches."
            )
        return _through_hooks(found, (module,))
    made = named("data", request.data.path)
    if isinstance(made, type) or inspect.isroutine(made):
        made = _called("data", request.data, made, dict(request.data.arguments))
    if hasattr(made, "train_dataloader") and not isinstance(made, nn.Module):
        loader = _loader_of(request, made)
        return _through_hooks(loader, (made, module))
    return made  # type: ignore[no-any-return]


def _loader_of(request: Request, data: Any) -> Any:
    """Return a data module's loader of the split, prepared as a Trainer does it."""
    what = request.data.path if request.data is not None else "data"
    try:
        for name, arguments in (("prepare_data", ()), ("setup", (SPLITS[request.split],))):
            hook = getattr(data, name, None)
            if callable(hook):
                hook(*arguments)
        found = getattr(data, f"{request.split}_dataloader")()
    except Exception as error:  # noqa: BLE001 - whatever the user's data does
        _refuse("data", f"{what}, split {request.split},", error)
    several = isinstance(found, Mapping) or (
        isinstance(found, (list, tuple)) and any(hasattr(item, "dataset") for item in found)
    )
    if found is None or several:
        kind = "no loader" if found is None else f"several loaders ({type(found).__name__})"
        raise CommandError(
            f"data: {what} gives {kind} for split {request.split}; name a function that returns "
            "the batches as training_step takes them."
        )
    return found


def _refuse(what: str, path: str, error: Exception) -> Any:
    raise CommandError(f"{what}: {path} ended in {described(error)}") from error


def _through_hooks(loader: Any, owners: tuple[Any, ...]) -> Iterable[Any]:
    """Return a loader's batches as the transfer hooks of the user's classes leave them."""
    hooks = []
    for name in ("on_before_batch_transfer", "on_after_batch_transfer"):
        for owner in owners:
            hook = getattr(owner, name, None)
            # Lightning's own ones hand the batch back as it is.
            if hook is not None and "lightning" not in hook.__module__.split(".")[0]:
                hooks.append(hook)
                break
    if not hooks:
        return loader  # type: ignore[no-any-return]

    def batches() -> Iterator[Any]:
        for batch in loader:
            for hook in hooks:
                batch = hook(batch, 0)
            yield batch

    return batches()

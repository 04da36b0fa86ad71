"""A run as a film: one picture a measurement, all in one scale."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lla_callbacks.hessian.layer_figures import MOST_LAYERS, layer_figure
from lla_callbacks.hessian.report import HessianReport
from lla_callbacks.objective.checks import number, whole
from lla_callbacks.objective.spelling import spelled
from lla_callbacks.report.sheet import WIDTH
from lla_callbacks.report.shown import pixels
from lla_callbacks.report.style import UP
from lla_callbacks.report.thinning import evenly
from lla_callbacks.slices.report import LandscapeReport
from lla_callbacks.slices.results import LossPlane

What = Literal["plane", "density", "layers"]
# Pictures of a film, evenly over the run where there are more; how long the last one stays.
MOST_FRAMES, LAST = 120, 1.5
# Height of the line that shows how far the run is, in pixels.
LINE = 3


@spelled
def animate(
    history: Any,
    path: str | Path,
    *,
    what: What | None = None,
    plane: str | None = None,
    metric: str | None = None,
    fps: float = 4.0,
    width: int = 460,
    title: str = "",
) -> Path:
    """Write how a plane, the spectrum or the layers moved over training, as a GIF or an MP4.

    All pictures have one scale: colours and axes that hold every one of them. The step is in the
    title, and a line at the bottom shows how far the run is.

    Args:
        history: Pairs of step and result, as ``monitor.history`` holds them, or the monitor; or
            files that it wrote: a folder such as ``<log_dir>/landscape/plane_random`` or
            ``<log_dir>/hessian``, or paths of ``step_00000100.npz``.
        path: Of the film. ``.gif`` needs Pillow, which matplotlib brings; ``.mp4`` needs
            ``ffmpeg`` on the path.
        what: ``"plane"``, ``"density"`` or ``"layers"`` (their traces); ``None``: a plane of
            slices, the density of spectra.
        plane: Name of the plane, where a history has several; ``None``: the first.
        metric: Draw this metric of the plane instead of the loss.
        fps: Pictures a second.
        width: Of the film, in pixels.
        title: Before the step; ``None`` says what it is.

    Returns:
        The path.

    Raises:
        ValueError: If there are fewer than two results that can be drawn so, or a setting is not
            allowed, or an MP4 is wanted and ffmpeg is not there.

    Example::

        >>> from lla_callbacks import animate
        >>> animate(monitor.history, "spectrum.gif", what="density")  # doctest: +SKIP
    """
    path = Path(path)
    number("fps", fps, "pictures a second, more than 0", above=0)
    whole("width", width, 64)
    if path.suffix not in (".gif", ".mp4"):
        raise ValueError(f"path is {str(path)!r}; give one that ends in .gif or .mp4.")
    program = shutil.which("ffmpeg")
    if path.suffix == ".mp4" and program is None:
        raise ValueError(f"{path.name} needs ffmpeg, which is not there; give a path with .gif.")
    if what not in (None, "plane", "density", "layers"):
        raise ValueError(f'what is {what!r}; give "plane", "density", "layers" or None.')
    found, what = _chosen(_as_pairs(history), what, plane)
    if len(found) < 2:
        raise ValueError(
            f"there {'is' if len(found) == 1 else 'are'} {len(found)} result"
            f"{'s' * (len(found) != 1)} to draw; give a history with two or more."
        )
    found = [found[i] for i in evenly([step for step, _ in found], MOST_FRAMES)]
    figures = _DRAWN[what](found, title, metric)
    steps = [step for step, _ in found]
    frames = _frames(figures, steps, width)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":
        _write_gif(path, frames, fps)
    else:
        assert program is not None
        _write_mp4(program, path, frames, fps)
    return path


def _as_pairs(history: Any) -> list[tuple[int, Any]]:
    """Return pairs of step and result, from memory or from files."""
    history = getattr(history, "history", history)
    if isinstance(history, (str, Path)):
        folder = Path(history)
        history = sorted(folder.glob("step_*.npz")) if folder.is_dir() else [folder]
        if not history:
            raise ValueError(f"{folder} holds no files step_*.npz; give a folder of one slice.")
    if not isinstance(history, Iterable):
        raise ValueError(
            f"history is of type {type(history).__name__}; give a monitor, its history, a folder "
            "or paths of .npz files."
        )
    found = []
    for entry in history:
        if isinstance(entry, (str, Path)):
            found.append(_read(Path(entry)))
        elif isinstance(entry, tuple) and len(entry) == 2:
            found.append((int(entry[0]), entry[1]))
        else:
            raise ValueError(
                f"history holds a {type(entry).__name__}; give pairs of step and result, or paths."
            )
    return found


def _read(path: Path) -> tuple[int, Any]:
    match = re.search(r"step_(\d+)", path.name)
    if match is None or not path.is_file():
        raise ValueError(f"{path} is no file step_<number>.npz that a monitor wrote.")
    with np.load(path, allow_pickle=False) as stored:
        kind = HessianReport if "nodes" in stored.files else LossPlane
    return int(match[1]), kind.load(path)


def _chosen(
    found: Sequence[tuple[int, Any]], what: What | None, plane: str | None
) -> tuple[list[tuple[int, Any]], What]:
    """Return the results that are drawn, and as what."""
    kept: list[tuple[int, Any]] = []
    spectra = any(isinstance(result, HessianReport) for _, result in found)
    what = what or ("density" if spectra else "plane")
    for step, result in found:
        if isinstance(result, LandscapeReport) and what == "plane":
            name = plane or next(iter(result.planes), "")
            if name in result.planes:
                kept.append((step, result.planes[name]))
        elif (isinstance(result, LossPlane) and what == "plane") or (
            isinstance(result, HessianReport)
            and (
                (what == "density" and result.nodes.numel()) or (what == "layers" and result.layers)
            )
        ):
            kept.append((step, result))
    if not kept and found:
        names = {n for _, r in found if isinstance(r, LandscapeReport) for n in r.planes}
        raise ValueError(
            f"nothing in the history can be drawn as {what!r}"
            + (f", plane {plane!r}; its planes are {', '.join(sorted(names))}." if names else ".")
        )
    return sorted(kept, key=lambda pair: pair[0]), what


def _title(title: str, default: str, step: int) -> str:
    return f"{title or default} at step {step:,}"


def _planes(found: Any, title: str, metric: str | None) -> list[Any]:
    """Return planes in colours that hold all of them."""
    values = [p.loss if metric is None else p.metrics.get(metric) for _, p in found]
    known = [v[v.isfinite()] for v in values if v is not None]
    known = [v for v in known if v.numel()]
    scale = None
    if known:
        low, high = min(float(v.min()) for v in known), max(float(v.max()) for v in known)
        scale = (low, high) if low < high else None
    name = found[0][1].directions[0].name.split()[0]
    default = f"{metric or 'Loss'} on the {name} plane"
    return [
        p.figure(title=_title(title, default, step), metric=metric, scale=scale, interpolate=True)
        for step, p in found
    ]


def _densities(found: Any, title: str, metric: str | None) -> list[Any]:
    figures = [m.figure(title=_title(title, "Hessian spectrum", step)) for step, m in found]
    return _aligned(figures)


def _layers(found: Any, title: str, metric: str | None) -> list[Any]:
    """Return bars of the same layers throughout, those with most curvature."""
    most: dict[str, float] = {}
    for _, m in found:
        for name, layer in m.layers.items():
            if math.isfinite(layer.trace):
                most[name] = max(most.get(name, 0.0), abs(layer.trace))
    kept = set(sorted(most, key=lambda name: -most[name])[:MOST_LAYERS])
    figures = [
        layer_figure(
            replace(m, layers={n: layer for n, layer in m.layers.items() if n in kept}),
            title=_title(title, "Curvature by layer", step),
        )
        for step, m in found
    ]
    return _aligned(figures)


_DRAWN: dict[str, Callable[..., list[Any]]] = {
    "plane": _planes, "density": _densities, "layers": _layers,
}  # fmt: skip


def _aligned(figures: list[Any]) -> list[Any]:
    """Give the axes of all figures the same range, and the ticks of the widest."""
    for axes in zip(*(figure.axes for figure in figures), strict=True):
        for which in ("x", "y"):
            ends = [getattr(a, f"get_{which}lim")() for a in axes]
            if ends[0][0] > ends[0][1]:
                # Layers from the top.
                continue
            low, high = min(a for a, _ in ends), max(b for _, b in ends)
            widest = max(axes, key=lambda a: np.ptp(getattr(a, f"get_{which}lim")()))
            axis = getattr(widest, f"{which}axis")
            ticks = axis.get_majorticklocs()
            texts = axis.get_major_formatter().format_ticks(ticks)
            for a in axes:
                own = getattr(a, f"{which}axis")
                own.set_ticks(ticks, labels=texts)
                own.set_ticks([], minor=True)
                getattr(a, f"set_{which}lim")(low, high)
    return figures


def _frames(figures: Sequence[Any], steps: Sequence[int], width: int) -> list[np.ndarray]:
    """Return pictures of one size, each with a line as long as the run is done."""
    drawn = []
    for figure in figures:
        figure.set_dpi(width / WIDTH)
        drawn.append(pixels(figure))
    # Even sizes: films of half a pixel's colour have no odd ones.
    height = 2 * math.ceil((max(len(frame) for frame in drawn) + 2 * LINE) / 2)
    wide = 2 * (max(frame.shape[1] for frame in drawn) // 2)
    color = [int(UP[i : i + 2], 16) for i in (1, 3, 5)]
    found = []
    for frame, step in zip(drawn, steps, strict=True):
        picture = np.full((height, wide, 3), 255, dtype=np.uint8)
        picture[: len(frame)] = frame[:, :wide]
        share = (step - steps[0]) / max(1, steps[-1] - steps[0])
        picture[-LINE:, : max(2, round(share * wide))] = color
        found.append(picture)
    return found


def _write_gif(path: Path, frames: Sequence[np.ndarray], fps: float) -> None:
    from PIL import Image

    # One palette of the first, the middle and the last picture: colours do not flicker.
    some = [frames[i] for i in sorted({0, len(frames) // 2, len(frames) - 1})]
    palette = Image.fromarray(np.concatenate(some)).quantize(255, dither=Image.Dither.NONE)
    images = [
        Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
        for frame in frames
    ]
    times = [round(1000 / fps)] * len(images)
    times[-1] = round(1000 * max(LAST, 1 / fps))
    images[0].save(
        path, save_all=True, append_images=images[1:], duration=times, loop=0, optimize=False
    )


def _write_mp4(program: str, path: Path, frames: Sequence[np.ndarray], fps: float) -> None:
    height, width, _ = frames[0].shape
    still = [frames[-1]] * round(fps * LAST)
    command = [
        program, "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24",
        "-s", f"{width}x{height}", "-r", str(fps), "-i", "-", "-pix_fmt", "yuv420p", str(path),
    ]  # fmt: skip
    data = b"".join(frame.tobytes() for frame in [*frames, *still])
    done = subprocess.run(command, input=data, capture_output=True, check=False)
    if done.returncode:
        raise ValueError(f"ffmpeg refused: {done.stderr.decode(errors='replace').strip()}")

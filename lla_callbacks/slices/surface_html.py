"""The loss over a plane as a surface that a browser can turn."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lla_callbacks.report.style import INK
from lla_callbacks.slices.fields import counted, facts_of, field_of
from lla_callbacks.slices.slices import Plane


def surface_html(
    plane: Plane,
    path: Path,
    *,
    title: str = "",
    cap: float | None = None,
    scale: tuple[float, float] | None = None,
) -> Path:
    """Write one HTML file that needs nothing else, and return its path.

    Args:
        plane: The plane.
        path: Of the file; folders are made.
        title: Above the surface.
        cap: Larger losses are drawn as this one.
        scale: Lowest and highest loss of the axis and the colours.

    Raises:
        ImportError: If plotly is not installed.
    """
    try:
        from plotly import graph_objects
    except ImportError as error:
        raise ImportError(
            "an interactive surface needs plotly, which is not installed: pip install plotly"
        ) from error
    field = field_of(plane, cap=cap, scale=scale)
    positions, texts = field.ticks()
    heights = np.clip(field.values, field.low, field.high)
    true = np.vectorize(field.scale.value)(field.values)
    surface = graph_objects.Surface(
        x=field.x,
        y=field.y,
        # Rows of plotly's table are y.
        z=heights.T,
        customdata=true.T,
        cmin=field.low,
        cmax=field.high,
        colorscale="Viridis",
        colorbar={"title": {"text": field.label}, "tickvals": positions, "ticktext": texts},
        hovertemplate="%{x:.4g}, %{y:.4g}<br>loss %{customdata:.5g}<extra></extra>",
        connectgaps=False,
    )
    points = counted(int(plane.evaluated.sum()), plane.evaluated.numel())
    footer = " · ".join(filter(None, facts_of(plane.facts, points)))
    figure = graph_objects.Figure(surface)
    figure.update_layout(
        title={"text": f"{title or 'Loss over a plane'}<br><sup>{footer}</sup>"},
        font={"color": INK},
        margin={"l": 0, "r": 0, "b": 0, "t": 70},
        scene={
            "xaxis": {"title": {"text": plane.directions[0].label}},
            "yaxis": {"title": {"text": plane.directions[1].label}},
            "zaxis": {
                "title": {"text": field.label},
                "tickvals": positions,
                "ticktext": texts,
                "range": [field.low, field.high],
            },
            "aspectratio": {"x": 1, "y": 1, "z": 0.7},
        },
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(str(path), include_plotlyjs=True)
    return path

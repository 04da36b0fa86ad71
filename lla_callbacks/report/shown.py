"""Figures as pixels and files, without pyplot; in a notebook they show themselves."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


class Picture(Figure):
    """A figure that a notebook shows as the last expression of a cell."""

    def _repr_png_(self) -> bytes:
        return png_of(self)


def pixels(figure: Figure) -> np.ndarray:
    """Return a figure as an image, shape ``(height, width, 3)``, uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])


def png_of(figure: Figure) -> bytes:
    """Return a figure as the bytes of a PNG file."""
    from PIL import Image

    buffer = BytesIO()
    # Beyond level 3 files hardly get smaller, and take half as long again.
    Image.fromarray(pixels(figure)).save(
        buffer, "PNG", compress_level=3, dpi=(figure.get_dpi(),) * 2
    )
    return buffer.getvalue()

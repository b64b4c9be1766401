"""One look for all figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe & Ito's palette, told apart by colour-blind readers.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
GREY = "#7f7f7f"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "savefig.dpi": 150,
}


def new_figure(columns: int = 1, size: tuple[float, float] = (4.0, 3.6)) -> tuple[Figure, Sequence[Axes]]:
    """A figure with `columns` axes in one row, each of `size` inches; no global state of matplotlib is touched."""
    with rc_context(STYLE):
        figure = Figure(figsize=(columns * size[0], size[1]), layout="constrained", dpi=110)
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, columns, squeeze=False)[0]
    return figure, list(axes)

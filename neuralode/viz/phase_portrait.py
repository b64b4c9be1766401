"""Phase portraits: arrays in, a figure out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from neuralode.viz.style import COLOURS, GREY, new_figure

Array = np.ndarray


def classifier_figure(
    axes: Sequence[Array],
    probability: Array,
    times: Array,
    path: Array,
    labels: Array,
    shown: Sequence[int],
    ticks: Sequence[Array],
    arrows: Array,
    hidden_dimensions: int = 0,
) -> Figure:
    """The decision boundary, then the points as the flow carries them.

    Args:
        axes: x [W] and y [H] coordinates of the boundary's grid.
        probability: of class 1 on that grid, [H, W].
        times: depth times, [T].
        path: states of N points at those times, first two dimensions, [T, N, 2].
        labels: classes, [N].
        shown: K indices of times, a panel each.
        ticks: coordinates of the field's grid, two arrays [G].
        arrows: the field at the shown times, [K, G, G, 2], first grid axis vertical.
        hidden_dimensions: augmented dimensions that the picture leaves out.
    """
    figure, panels = new_figure(1 + len(shown), (3.2, 3.4))
    soft = LinearSegmentedColormap.from_list("classes", [COLOURS[0], "white", COLOURS[1]])
    colours = [COLOURS[int(label) % len(COLOURS)] for label in labels]

    first = panels[0]
    first.contourf(axes[0], axes[1], probability, levels=21, cmap=soft, vmin=0, vmax=1, alpha=0.6)
    first.contour(axes[0], axes[1], probability, levels=[0.5], colors="black", linewidths=1.2)
    first.scatter(path[0, :, 0], path[0, :, 1], c=colours, s=6, linewidths=0)
    first.set_title("decision boundary")

    note = f"; {hidden_dimensions} more dimensions unseen" if hidden_dimensions else ""
    for panel, index, field in zip(panels[1:], shown, arrows, strict=True):
        _stream(panel, ticks, field)
        for sample in range(0, path.shape[1], max(1, path.shape[1] // 40)):
            panel.plot(*path[: index + 1, sample].T, color=colours[sample], lw=0.5, alpha=0.5)
        panel.scatter(path[index, :, 0], path[index, :, 1], c=colours, s=6, linewidths=0, zorder=3)
        panel.set_title(f"t = {times[index]:.2f}")
    figure.suptitle(f"The flow carries the points from left to right (grey: vector field{note})", fontsize=10)
    for panel in panels:
        panel.set_aspect("equal", adjustable="datalim")
        panel.set_xlabel("$y_1$")
    panels[0].set_ylabel("$y_2$")
    return figure


def series_figure(
    times: Array,
    record: Array,
    fine_times: Array,
    curve: Array,
    names: Sequence[str],
    train_until: float | None,
    ticks: Sequence[Array] | None = None,
    arrows: Array | None = None,
) -> Figure:
    """The record and the model's curve over time, and for two columns in the phase plane with the vector field.

    Args:
        times, record: what was observed, [T] and [T, D].
        fine_times, curve: the model's solution, [F] and [F, D].
        names: of the D columns.
        train_until: last fitted time; what comes after is a forecast.
        ticks, arrows: two arrays [G] and the field [G, G, 2], first grid axis vertical.
    """
    plane = ticks is not None and arrows is not None
    figure, panels = new_figure(1 + plane, (5.2, 3.6))
    draw_series(panels[0], times, record, [("model", fine_times, curve)], names, train_until)
    if ticks is not None and arrows is not None:
        _stream(panels[1], ticks, arrows)
        panels[1].plot(*record.T, "o", color="black", ms=2.5, label="record")
        panels[1].plot(*curve.T, color=COLOURS[0], lw=1.4, label="model")
        panels[1].plot(*curve[0], "s", color=COLOURS[0], ms=5)
        panels[1].set(xlabel=names[0], ylabel=names[1], title="phase plane (grey: learned vector field)")
        panels[1].legend(loc="upper right")
    return figure


def draw_series(
    panel: Axes,
    times: Array,
    record: Array,
    curves: Sequence[tuple[str, Array, Array]],
    names: Sequence[str],
    train_until: float | None,
) -> None:
    """Columns by colour, curves by line style: `curves` holds (label, times [F], values [F, D])."""
    dashes = ["-", "--", ":", "-."]
    for column, name in enumerate(names):
        colour = COLOURS[column % len(COLOURS)]
        panel.plot(
            times, record[:, column], "o", color=colour, ms=3 if len(times) < 100 else 1, label=f"{name}, record"
        )
        for i, (label, fine, values) in enumerate(curves):
            panel.plot(fine, values[:, column], dashes[i % 4], color=colour, lw=1.3, label=f"{name}, {label}")
    if train_until is not None:
        panel.axvspan(train_until, float(times[-1]), color=GREY, alpha=0.15, lw=0, label="forecast")
    if times[-1] - times[0] >= 10:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))  # years, say
    panel.set(xlabel="t", title="record and model")
    panel.legend(fontsize=7)


def line_figure(x: Array, y: Array, ends: Array, line: Array) -> Figure:
    """A regression line through its points.

    Args:
        x, y: the points, [N] each.
        ends, line: the model's values [2] at two ends [2].
    """
    figure, (panel,) = new_figure(1, (4.4, 3.6))
    slope, offset = np.polyfit(x, y, 1)
    panel.plot(x, y, "o", color=GREY, ms=3, label="data")
    panel.plot(
        ends, offset + slope * ends, color="black", lw=3, alpha=0.3, label=f"least squares {offset:.4f} + {slope:.4f} x"
    )
    slope, offset = np.polyfit(ends, line, 1)
    panel.plot(ends, line, color=COLOURS[1], lw=1.4, label=f"model {offset:.4f} + {slope:.4f} x")
    panel.set(xlabel="x", ylabel="y")
    panel.legend()
    return figure


def _stream(panel: Axes, ticks: Sequence[Array], arrows: Array) -> None:
    speed = np.linalg.norm(arrows, axis=-1)
    if speed.max() > 0:
        x, y = ticks
        panel.streamplot(x, y, arrows[..., 0], arrows[..., 1], color=GREY, linewidth=0.5, arrowsize=0.6, density=0.8)

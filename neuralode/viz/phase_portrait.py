"""Phase portraits: arrays in, a figure out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
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


def regression_figure(x: Array, y: Array, path: Array) -> Figure:
    """A line through its points while it is learned, and the way of its two weights over the mean squared error.

    Args:
        x, y: the points, [N] each.
        path: intercept and slope as training went on, [K, 2].
    """
    figure, panels = new_figure(2, (4.6, 3.8))
    slope, intercept = np.polyfit(x, y, 1)
    _draw_lines(panels[0], x, y, path, np.array([intercept, slope]))
    _draw_descent(panels[1], x, y, path, np.array([intercept, slope]))
    return figure


def _draw_lines(panel: Axes, x: Array, y: Array, path: Array, best: Array) -> None:
    ends = np.array([x.min(), x.max()])
    panel.plot(x, y, "o", color=GREY, ms=3, alpha=0.7, label="data")
    panel.plot(ends, best[0] + best[1] * ends, color="black", lw=4, alpha=0.3, label=_formula("least squares", best))
    # as many lines as can be told apart, each a like way from the one before
    gone = np.concatenate([[0.0], np.linalg.norm(np.diff(path, axis=0), axis=1).cumsum()])
    for part in np.linspace(0, 1, 7)[:-1] if gone[-1] > 0 else ():
        intercept, slope = path[np.searchsorted(gone, part * gone[-1])]
        panel.plot(ends, intercept + slope * ends, color=COLOURS[1], lw=0.8, alpha=0.2 + 0.5 * part)
    panel.plot(ends, path[-1, 0] + path[-1, 1] * ends, color=COLOURS[1], lw=1.6, label=_formula("model", path[-1]))
    panel.set(xlabel="x", ylabel="y", title="the line, and on its way there (pale)")
    panel.legend(fontsize=8)


def _draw_descent(panel: Axes, x: Array, y: Array, path: Array, best: Array) -> None:
    points = np.vstack([path, best])
    margin = 0.25 * np.ptp(points, axis=0).max() + 1e-3
    low, high = points.min(0) - margin, points.max(0) + margin
    ticks = [np.linspace(low[i], high[i], 60) for i in range(2)]
    residual = ticks[0][None, :, None] + ticks[1][:, None, None] * x - y  # [slope, intercept, N]
    loss = np.square(residual).mean(-1)
    levels = np.geomspace(loss.min(), loss.max(), 16)
    levels[[0, -1]] = loss.min(), loss.max()  # rounding must not leave the extremes out
    if levels[0] > 0:
        panel.contourf(*ticks, loss, levels=levels, norm=LogNorm(), cmap="Greys", alpha=0.45)
    _stream(panel, ticks, -2 * np.stack([residual.mean(-1), (residual * x).mean(-1)], -1))
    panel.plot(*path.T, ".-", color=COLOURS[1], lw=1.2, ms=4, markevery=max(1, len(path) // 200), label="weights")
    panel.plot(*path[0], "o", color="white", mec="black", ms=7, label="start")
    panel.plot(*best, "x", color="black", ms=8, mew=2, label="least squares")
    panel.set(xlabel="intercept", ylabel="slope", title="descent on the loss (grey: −∇L)")
    panel.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    panel.legend(fontsize=8, loc="lower right", frameon=True, framealpha=0.8, edgecolor="none")


def _formula(name: str, weights: Array) -> str:
    sign = "−" if weights[1] < 0 else "+"
    return f"{name} {weights[0]:.4f} {sign} {abs(weights[1]):.4f} x"


def _stream(panel: Axes, ticks: Sequence[Array], arrows: Array) -> None:
    speed = np.linalg.norm(arrows, axis=-1)
    if speed.max() > 0:
        x, y = ticks
        panel.streamplot(x, y, arrows[..., 0], arrows[..., 1], color=GREY, linewidth=0.5, arrowsize=0.6, density=0.8)

"""Figures of an optimiser beside its gradient flow: arrays in, a figure out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from neuralode.viz.phase_portrait import Array
from neuralode.viz.style import COLOURS, GREY, new_figure

# The paths often lie on top of one another: width, dashes and the shape of the end tell them apart, not colour alone.
_LINES: dict[str, dict[str, Any]] = {
    "gradient flow": {"color": COLOURS[0], "lw": 3.5, "alpha": 0.75, "zorder": 3},
    "descent on the probe": {"color": COLOURS[2], "lw": 1.5, "ls": "-.", "zorder": 4},
    "SGD": {"color": COLOURS[1], "lw": 0.8, "marker": ".", "ms": 4, "zorder": 5},
    "closed form": {"color": "black", "lw": 1.2, "ls": "--", "zorder": 6},
}
_ENDS: dict[str, dict[str, Any]] = {
    "gradient flow": {"marker": "o", "ms": 11},
    "descent on the probe": {"marker": "D", "ms": 7},
    "SGD": {"marker": "s", "ms": 5},
    "closed form": {"marker": "x", "ms": 6, "mew": 1.5},
}
for _name in ("Adam", "AdamW"):  # each looks as SGD does, for a picture has one of them
    _LINES[_name], _ENDS[_name] = _LINES["SGD"], _ENDS["SGD"]
_PAPER = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
_GREEN, _AMBER, _RED = COLOURS[2], COLOURS[4], COLOURS[1]
_NEAR, _EDGE, _SCALE = 0.8, 1.0, 1.5


def trajectory_figure(
    paths: Mapping[str, Array], contours: tuple[Array, Array, Array] | None, explained: float, title: str
) -> Figure:
    """Paths through weight space, drawn in one plane, on the loss.

    Args:
        paths: label -> coordinates in the plane, in the units of θ, [T, 2]; T may differ between the paths.
            "gradient flow", "SGD", "descent on the probe" and "closed form" have their own looks.
        contours: x [X], y [Y] and the loss [Y, X] on that grid, in the loss's own unit; may hold inf and nan.
        explained: share of the paths' variance that lies in the plane, 0 to 1.
        title: of the figure.
    """
    figure, (panel,) = new_figure(1, (5.4, 4.9))
    if contours is not None:
        _draw_loss(figure, panel, *contours)
    finite = {label: path[np.isfinite(path).all(axis=1)] for label, path in paths.items()}
    for index, (label, path) in enumerate(finite.items()):
        look = _look(label, index)
        panel.plot(*path.T, label=label, markevery=max(1, len(path) // 60), **look)
        end: dict[str, Any] = {"marker": "o", "ms": 6} | _ENDS.get(label, {})
        ends: dict[str, Any] = {"color": look["color"], "mec": "black" if end["marker"] == "x" else "white"}
        panel.plot(*path[-1:].T, ls="", label="_end", zorder=look["zorder"] + 10, **ends, **end)
    if seen := [path for path in finite.values() if len(path)]:
        _mark_start(panel, seen)
    panel.set(xlabel="first direction in θ", ylabel="second direction in θ")
    panel.set_title(title, fontsize=10, pad=20)
    note = f"the plane holds {100 * explained:.0f} % of the path"
    panel.text(0.5, 1.02, note, transform=panel.transAxes, fontsize=8, ha="center")
    width, height = panel.dataLim.size
    if 0 < max(width, height) <= 1.5 * min(width, height):
        panel.set_aspect("equal", adjustable="box")
    if paths:
        figure.legend(loc="outside lower center", ncols=min(4, len(paths)), fontsize=8, frameon=False, handlelength=2.8)
    return figure


def curves_figure(s: Array, losses: Mapping[str, Array], distances: Mapping[str, Array], title: str) -> Figure:
    """Losses and distances over flow time.

    Args:
        s: flow time, the sum of the learning rates, [T].
        losses: label -> loss at those times, in its own unit, [T].
        distances: label -> distance in the units of θ, [T].
        title: of the figure.
    """
    figure, panels = new_figure(2, (4.2, 3.4))
    for panel, curves, name in zip(panels, (losses, distances), ("loss", "distance in θ"), strict=True):
        for index, (label, values) in enumerate(curves.items()):
            panel.plot(s, values, label=label, markevery=max(1, len(s) // 40), **_look(label, index))
        panel.set(xlabel="flow time s = Σ η", ylabel=name)
        if curves:
            above: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 2}
            panel.legend(fontsize=8, frameon=False, handlelength=2.8, **above)
    if _spans_a_decade(losses.values()):
        panels[0].set_yscale("log")
    panels[1].set_ylim(bottom=0)
    figure.suptitle(title, fontsize=10)
    return figure


def edge_figure(steps: Array, sharpness: Array, threshold: Array, title: str) -> Figure:
    """The sharpness against the optimiser's stability threshold, and where it first rises through it.

    Args:
        steps: training steps, increasing, [T].
        sharpness: largest eigenvalue of the loss's Hessian, in loss per squared unit of θ, [T]; nan if not measured.
        threshold: the eigenvalue above which the optimiser is unstable, 2/η for SGD, in the same unit, [T].
        title: of the figure.
    """
    figure, (panel,) = new_figure(1, (5.6, 3.6))
    if len(steps) == 1:  # a point has no width to draw a threshold over
        steps, sharpness = steps[0] + np.array([-0.5, 0, 0.5]), np.array([np.nan, sharpness[0], np.nan])
        threshold = np.repeat(threshold, 3)
        panel.set_xticks(steps[1:2])
    top = _ceiling(sharpness, threshold)
    # An infinite threshold (a learning rate of zero) leaves the whole height stable.
    edge = np.minimum(threshold, top)
    panel.fill_between(steps, edge, top, color=_RED, alpha=0.13, lw=0)
    panel.fill_between(steps, 0, edge, color=_GREEN, alpha=0.13, lw=0)
    # It is measured more seldom than the threshold is known: join the measurements over the gaps.
    known = np.isfinite(sharpness)
    style, label = ".-" if known.sum() < 50 else "-", r"sharpness $λ_\mathrm{max}$"
    if known.sum() == 1:  # no line to read it off
        style, step, value = "o", steps[known][0], sharpness[known][0]
        _say(panel, f"{value:.4g} at step {step:g}", (step, value), right=True, up=value < top / 2)
    panel.plot(steps[known], sharpness[known], style, color=COLOURS[0], lw=1.4, label=label, clip_on=False)
    panel.plot(steps, edge, color="black", lw=1.2, ls="--", label="stability threshold")
    panel.margins(x=0)
    panel.set(xlabel="step", ylabel="largest eigenvalue of the Hessian", ylim=(0, top))
    line = np.interp(steps, steps[known], sharpness[known]) if known.any() else np.zeros(len(steps))
    # The words go where neither line runs.
    _write_in_gap(panel, "oscillates", steps, np.maximum(edge, line), np.full(len(steps), top), _RED)
    over = edge - line > line
    _write_in_gap(panel, "stable", steps, np.where(over, line, 0), np.where(over, edge, np.minimum(edge, line)), _GREEN)
    if crossing := _first_crossing(steps, sharpness, threshold):
        _mark_crossing(panel, *crossing)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    return figure


def gauge_figure(ratio: float, title: str = "") -> Figure:
    """How near the optimiser is to its edge of stability, for a reader who knows nothing of eigenvalues.

    Args:
        ratio: sharpness over the optimiser's threshold, a pure number; 1 is the edge, nan is not measured.
        title: of the figure, if any.
    """
    figure, (panel,) = new_figure(1, (5.2, 2.3))
    dim = 0.3 if np.isnan(ratio) else 1.0
    for left, right, colour in ((0.0, _NEAR, _GREEN), (_NEAR, _EDGE, _AMBER), (_EDGE, _SCALE, _RED)):
        panel.barh(0, right - left, left=left, height=1, color=colour, alpha=dim, edgecolor="white", lw=1.5)
    number, words, colour = _verdict(ratio)
    if not np.isnan(ratio):
        place = min(max(ratio, 0.0), _SCALE)
        look: dict[str, Any] = {"color": "black", "lw": 2.5, "ms": 11, "clip_on": False, "zorder": 3}
        panel.plot([place] * 2, [-0.6, 0.75], "v-", markevery=[1], label="needle", **look)
    panel.text(_SCALE / 2, 1.15, number, fontsize=28, fontweight="bold", color=colour, ha="center", va="bottom")
    panel.set_xlabel(words, fontsize=10, labelpad=8)
    panel.set_xticks([0, _NEAR, _EDGE, _SCALE], ["0", "0.8", "1\nedge", "1.5"], fontsize=8)
    panel.set(xlim=(0, _SCALE), ylim=(-0.6, 2.3), yticks=[])
    panel.tick_params(axis="x", length=0)
    panel.spines[:].set_visible(False)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _look(label: str, index: int) -> dict[str, Any]:
    # Any other label is a thin line; pink comes first, since the known labels hold the palette's first three colours.
    other = {"color": COLOURS[3 + index % 3], "lw": 1.2, "ls": ["-", ":", "--"][index % 3], "zorder": 4}
    return _LINES.get(label, other)


def _finite(values: Array) -> Array:
    return np.extract(np.isfinite(values), values)


def _spans_a_decade(curves: Iterable[Array]) -> bool:
    found = np.concatenate([np.empty(0), *(_finite(values).ravel() for values in curves)])
    return bool(found.size and found.min() > 0 and found.max() > 10 * found.min())


def _draw_loss(figure: Figure, panel: Axes, x: Array, y: Array, loss: Array) -> None:
    found = _finite(loss)
    if not found.size or found.min() == found.max():
        return  # nothing to contour, and matplotlib would warn
    low, high, log = float(found.min()), float(found.max()), _spans_a_decade([loss])
    levels = np.geomspace(low, high, 16) if log else np.linspace(low, high, 13)
    levels[0], levels[-1] = low, high  # rounding must not leave the extremes out
    masked = np.ma.array(loss, mask=~np.isfinite(loss))
    look: dict[str, Any] = {"levels": levels, "norm": LogNorm(low, high) if log else None}
    filled = panel.contourf(x, y, masked, cmap="Greys", alpha=0.45, **look)
    panel.contour(x, y, masked, colors="white", linewidths=0.5, levels=levels[1:-1])
    ticks = LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)) if log else MaxNLocator(6)
    bar = figure.colorbar(filled, ax=panel, label="loss", ticks=ticks, format="%g", shrink=0.8)
    bar.ax.minorticks_off()
    if masked.mask.any():  # where the loss overflows must not look like a low loss; 0.01 closes the gap to the finite
        gone = panel.contourf(x, y, masked.mask, levels=[0.01, 1.5], colors="none", hatches=["///"], zorder=0.5)
        gone.set(edgecolor="#c0c0c0", linewidth=0)


def _mark_start(panel: Axes, paths: list[Array]) -> None:
    start = paths[0][0]
    panel.plot(*start, "o", color="white", mec="black", ms=7, label="_start", zorder=20)
    ahead = np.mean([path.mean(axis=0) for path in paths], axis=0) - start
    _say(panel, "start", start, right=ahead[0] > 0, up=ahead[1] < 0)


def _say(panel: Axes, words: str, point: Any, right: bool, up: bool) -> None:
    offset = (9 if right else -9, 9 if up else -9)
    look: dict[str, Any] = {"ha": "left" if right else "right", "va": "bottom" if up else "top", "bbox": _PAPER}
    panel.annotate(words, point, xytext=offset, textcoords="offset points", fontsize=9, zorder=20, **look)


def _ceiling(sharpness: Array, threshold: Array) -> float:
    # A decaying learning rate sends the threshold to infinity; it must not flatten the sharpness.
    edge = _finite(threshold) if np.isfinite(threshold).any() else np.zeros(1)
    needed = max([*_finite(sharpness), edge.min()])
    return 1.25 * float(min(max(edge.max(), needed), 2 * needed)) or 1.0


def _write_in_gap(panel: Axes, word: str, steps: Array, low: Array, high: Array, colour: str) -> None:
    first, width = steps[0], steps[-1] - steps[0]
    best, at, middle = 0.0, 0.0, 0.0
    for place in first + width * np.linspace(0.12, 0.88, 20):
        near = place + width * np.linspace(-0.12, 0.12, 9)  # the word's own width, and air
        bottom, top = np.interp(near, steps, low).max(), np.interp(near, steps, high).min()
        if top - bottom > best:
            best, at, middle = top - bottom, place, (bottom + top) / 2
    if best > 0:
        panel.text(at, middle, word, color=colour, ha="center", va="center", fontsize=11, fontweight="bold")


def _first_crossing(steps: Array, sharpness: Array, threshold: Array) -> tuple[float, float] | None:
    known = np.isfinite(sharpness) & np.isfinite(threshold)
    k, edge = steps[known], threshold[known]
    above = sharpness[known] - edge
    rises = np.flatnonzero((above[:-1] < 0) & (above[1:] >= 0))
    if not rises.size:
        return None
    i = rises[0]
    part = above[i] / (above[i] - above[i + 1])
    return float(k[i] + part * (k[i + 1] - k[i])), float(edge[i] + part * (edge[i + 1] - edge[i]))


def _mark_crossing(panel: Axes, step: float, value: float) -> None:
    panel.plot([step], [value], "o", color=COLOURS[0], mec="white", ms=8, label="_crossing", zorder=5)
    late = panel.transLimits.transform((step, value))[0] > 0.65  # words on the right would leave the figure
    _say(panel, f"crosses at step {step:.0f}", (step, value), right=not late, up=late)


def _verdict(ratio: float) -> tuple[str, str, str]:
    if np.isnan(ratio):
        return "–", "not measured yet", GREY
    number = f"{ratio:.2f}" if abs(ratio) < 100 else f"{ratio:.3g}"
    if ratio < _NEAR:
        return number, "stable: far from the edge", _GREEN
    if ratio <= _EDGE:
        return number, "near the edge", _AMBER
    return number, "beyond the edge: expect oscillation along the top eigenvector", _RED

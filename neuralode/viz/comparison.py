"""Figures of a whole experiment: its arms side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from neuralode.viz.phase_portrait import Array, draw_series
from neuralode.viz.style import COLOURS, new_figure


def arms_figure(values: Mapping[str, Mapping[str, Sequence[float]]], title: str) -> Figure:
    """A panel a column, a row an arm, a dot a seed and a bar at the mean.

    Args:
        values: column -> arm -> one value a seed.
        title: of the figure.
    """
    arms = list(next(iter(values.values())))
    figure, panels = new_figure(len(values), (2.6, 1.3 + 0.5 * len(arms)))
    for panel, (column, by_arm) in zip(panels, values.items(), strict=True):
        for row, arm in enumerate(arms):
            found = list(by_arm.get(arm, []))
            panel.plot(found, [row] * len(found), "o", color=COLOURS[row % len(COLOURS)], alpha=0.6, ms=5)
            if found:
                panel.plot([float(np.mean(found))] * 2, [row - 0.25, row + 0.25], color="black", lw=1.5)
        panel.set_yticks(range(len(arms)), arms if panel is panels[0] else [""] * len(arms))
        panel.set_ylim(len(arms) - 0.5, -0.5)
        panel.set_title(column)
        panel.margins(x=0.15)
        panel.locator_params(axis="x", nbins=4)
        if max((v for found in by_arm.values() for v in found), default=0) >= 10_000:
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.grid(axis="x", alpha=0.3)
    figure.suptitle(title, fontsize=10)
    return figure


def forecasts_figure(
    times: Array,
    record: Array,
    curves: Sequence[tuple[str, Array, Array]],
    names: Sequence[str],
    train_until: float | None,
) -> Figure:
    """Several models' curves over one record; arguments as in `draw_series`. A panel a column."""
    figure, panels = new_figure(len(names), (5.0, 3.6))
    for column, (panel, name) in enumerate(zip(panels, names, strict=True)):
        one = [(label, fine, values[:, [column]]) for label, fine, values in curves]
        draw_series(panel, times, record[:, [column]], one, [name], train_until)
        for index, (line, _) in enumerate(zip(panel.get_lines()[1:], curves, strict=True)):
            line.set_color(COLOURS[1 + index])
        panel.get_lines()[0].set_color("black")
        panel.set_title(name)
        panel.legend(fontsize=7)
    return figure


def learning_figure(curves: Mapping[str, tuple[Array, Array]], title: str) -> Figure:
    """Scalars over training steps, a panel for each name after the slash: train and val of one metric together.

    Args:
        curves: tag such as `val/loss` -> (steps [K], values [K]).
    """
    metrics = sorted({tag.split("/", 1)[1] for tag in curves}, key=lambda metric: (metric != "loss", metric))
    figure, panels = new_figure(len(metrics), (3.8, 3.0))
    for panel, metric in zip(panels, metrics, strict=True):
        for tag, (steps, values) in curves.items():
            stage, name = tag.split("/", 1)
            if name == metric:
                panel.plot(steps, values, lw=1.2, label=stage, color=COLOURS[0 if stage == "train" else 1])
        positive = all((v > 0).all() for tag, (_, v) in curves.items() if tag.endswith(f"/{metric}"))
        panel.set(xlabel="step", title=metric, yscale="log" if metric in ("loss", "mae") and positive else "linear")
        panel.legend()
    figure.suptitle(title, fontsize=10)
    return figure

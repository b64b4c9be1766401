from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from neuralode.viz.gradient_flow import curves_figure, edge_figure, gauge_figure, trajectory_figure

S = np.linspace(0, 1, 11)
PATHS = {"SGD": np.stack([S, S**2], 1), "gradient flow": np.stack([S, S**2 + 0.05 * S], 1)}


def texts(figure: object) -> str:
    return " | ".join(t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text")))  # type: ignore[attr-defined]


def labels(axes: object) -> set[str]:
    return {line.get_label() for line in axes.get_lines() if not line.get_label().startswith("_")}  # type: ignore[attr-defined]


def test_the_trajectory_shows_every_path_and_what_the_plane_holds() -> None:
    figure = trajectory_figure(PATHS, None, 0.973, "θ")
    assert labels(figure.axes[0]) >= set(PATHS)
    assert "97 %" in texts(figure)
    assert "start" in texts(figure)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_contours_bear_losses_that_are_not_finite(bad: float, tmp_path: Path) -> None:
    loss = np.logspace(-3, 3, 81).reshape(9, 9)
    loss[0, 0] = bad
    axis = np.linspace(-1, 2, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trajectory_figure(PATHS, (axis, axis, loss), 1.0, "θ").savefig(tmp_path / "t.png")
    assert (tmp_path / "t.png").stat().st_size > 1000


@pytest.mark.parametrize(("top", "scale"), [(2.0, "linear"), (1000.0, "log")])
def test_losses_over_more_than_a_decade_are_drawn_on_a_log_scale(top: float, scale: str) -> None:
    losses = {"SGD": np.linspace(top, 1.0, 11), "gradient flow": np.linspace(top, 1.1, 11)}
    figure = curves_figure(S, losses, {"SGD": S}, "steps 0 to 10")
    left, right = figure.axes[:2]
    assert left.get_yscale() == scale
    assert labels(left) == set(losses)
    assert labels(right) == {"SGD"}


def test_the_crossing_is_interpolated_and_named() -> None:
    steps, sharpness = np.array([0, 400, 500, 600]), np.array([2.0, 4.0, 6.0, 5.0])
    assert "crosses at step 450" in texts(edge_figure(steps, sharpness, np.full(4, 5.0), ""))
    assert "crosses" not in texts(edge_figure(steps, sharpness, np.full(4, 9.0), ""))


@pytest.mark.parametrize(
    ("ratio", "number", "words"),
    [
        (0.3, "0.30", "stable"),
        (0.9, "0.90", "near the edge"),
        (1.2, "1.20", "oscillation"),
        (7.0, "7.00", "oscillation"),
        (float("nan"), "", "not measured yet"),
    ],
)
def test_the_gauge_says_what_its_number_means(ratio: float, number: str, words: str) -> None:
    said = texts(gauge_figure(ratio))
    assert number in said
    assert words in said

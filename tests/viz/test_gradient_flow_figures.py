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


def test_every_figure_saves_without_a_warning_even_with_little_to_show(tmp_path: Path) -> None:
    steps, nothing = np.arange(3.0), np.full(3, np.nan)
    axis = np.linspace(-1, 2, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = [
            trajectory_figure({"SGD": np.full((3, 2), np.nan)}, (axis, axis, np.full((9, 9), np.inf)), 0.5, ""),
            trajectory_figure(PATHS, (axis, axis, np.ones((9, 9))), 0.5, ""),
            curves_figure(steps, {"SGD": nothing}, {"SGD": nothing}, ""),
            edge_figure(steps, nothing, np.array([2.0, 4.0, np.inf]), ""),
            edge_figure(np.array([7]), np.array([1.0]), np.array([5.0]), ""),
            gauge_figure(float("nan"), "SGD"),
            gauge_figure(float("inf"), "SGD"),
        ]
        for index, figure in enumerate(figures):
            figure.savefig(tmp_path / f"{index}.png", dpi=40)
            assert (tmp_path / f"{index}.png").stat().st_size > 1000


def test_each_path_has_its_own_line_and_end_where_it_was_last_finite() -> None:
    broken = PATHS["SGD"].copy()
    broken[6:] = np.inf
    panel = trajectory_figure(PATHS | {"SGD": broken}, None, 1.0, "").axes[0]
    lines = {line.get_label(): line for line in panel.get_lines()}
    assert lines["SGD"].get_linewidth() < lines["gradient flow"].get_linewidth()
    ends = [np.array(line.get_xydata())[0] for line in panel.get_lines() if line.get_label() == "_end"]
    np.testing.assert_allclose(ends, [broken[5], PATHS["gradient flow"][-1]])


def test_sharpness_measured_now_and_then_is_joined_and_its_crossing_found() -> None:
    sharpness = np.array([2.0, np.nan, 4.0, np.nan, 6.0])
    figure = edge_figure(np.arange(5) * 100, sharpness, np.full(5, 5.0), "")
    line = next(line for line in figure.axes[0].get_lines() if str(line.get_label()).startswith("sharpness"))
    np.testing.assert_array_equal(line.get_ydata(), [2, 4, 6])
    assert "crosses at step 300" in texts(figure)
    assert figure.axes[0].get_ylim()[0] == 0


def test_one_measurement_is_a_point_with_its_value() -> None:
    figure = edge_figure(np.array([7]), np.array([1.25]), np.array([5.0]), "")
    line = next(line for line in figure.axes[0].get_lines() if str(line.get_label()).startswith("sharpness"))
    assert line.get_xydata().tolist() == [[7, 1.25]]
    assert line.get_marker() == "o"
    assert "1.25 at step 7" in texts(figure)


def test_a_threshold_that_grows_without_bound_does_not_flatten_the_sharpness() -> None:
    threshold = np.array([5.0, 50.0, 1e6, np.inf])
    figure = edge_figure(np.arange(4), np.array([2.0, 3.0, 4.0, 4.5]), threshold, "")
    assert 5 < figure.axes[0].get_ylim()[1] < 20
    assert "crosses" not in texts(figure)


@pytest.mark.parametrize(("ratio", "place"), [(0.3, 0.3), (7.0, 1.5), (-0.2, 0.0)])
def test_the_needle_stays_on_the_scale(ratio: float, place: float) -> None:
    (needle,) = gauge_figure(ratio).axes[0].get_lines()
    assert needle.get_xdata()[0] == pytest.approx(place)


def test_nothing_measured_has_no_needle() -> None:
    assert not gauge_figure(float("nan")).axes[0].get_lines()
